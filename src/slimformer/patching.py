"""Patch a model, undo it exactly, and say what is patched: the ledger."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from slimformer.anatomy import (
    KINDS,
    Anatomy,
    Kind,
    attention_core,
    find_anatomy,
    transformer_of,
)
from slimformer.attention_transforms import Attentions, AttentionTransform, transformed_by
from slimformer.cache_layout import CacheLayout, CacheOwner
from slimformer.continuous_batching import refuse_continuous_batching
from slimformer.errors import PlanError
from slimformer.executor import LayerExecutor, TokenPolicy
from slimformer.integrations.sentence_transformers import faster_pipeline
from slimformer.layer_calls import first_layer_call
from slimformer.ledger import Ledger
from slimformer.methods.unpadding import Unpadding
from slimformer.plan import Plan
from slimformer.stack_calls import Observed, hands_on, read_stack_calls
from slimformer.stored_plan import save_with_plan, stored_plan
from slimformer.switched_layer import SwitchedLayer
from slimformer.tiers import Support, examine_support
from slimformer.versions import warn_if_untried

Model = TypeVar("Model")
Method: TypeAlias = TokenPolicy | AttentionTransform
Executor: TypeAlias = LayerExecutor | SwitchedLayer
_ATTRIBUTE = "_slimformer"
_logger = logging.getLogger("slimformer")


@dataclass
class Patch:
    """What `patch` leaves on the model: the methods, the executors in place, the ledger, and notes for `status`."""

    methods: tuple[Method, ...]
    executors: dict[int, Executor]
    ledger: Ledger
    notes: dict[int, str] = field(default_factory=dict)


def patch(model: Model, *methods: Method | str | os.PathLike[str]) -> Model:
    """Apply methods to a model, in place. A model that is patched already is unpatched first.

    What loses nothing is always applied: no padding is computed, and on a GPU norms, rotations, activations and
    residual additions run as fused kernels.

    Args:
        model: A transformers model, or a SentenceTransformer, CrossEncoder or Pipeline that holds one. What saves it
            writes the plan beside it.
        methods: What to apply: methods, plans, or where a plan is (folder, file or Hub id). Token policies compose by
            intersection: a sublayer computes what all of them keep. Attention transforms follow each other in the
            order given. With none, the plan that lies beside the
            checkpoint is applied, and without one only what loses nothing.

    Returns:
        The same object.

    Raises:
        PlanError: If a method does not fit the model, which is left as it was.
        UnsupportedModelError: If the model's structure is not known.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import slimformer
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> model = slimformer.patch(LlamaForCausalLM(config), slimformer.LayerDrop(attention=[0, 2]))
        >>> slimformer.status(model)[2]
        {'attention': 'dropped', 'mlp': 'text rows'}
        >>> slimformer.status(slimformer.unpatch(model))
        {}
    """
    warn_if_untried()
    inner = transformer_of(model)
    chosen = tuple(_method(given) for given in methods) or _plan_beside_checkpoint(inner)
    previous = vars(inner).get(_ATTRIBUTE)
    unpatch(inner)
    try:
        _apply(inner, chosen, model)
    except BaseException:
        if previous is not None:
            _apply(inner, previous.methods, model)
        raise
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch` exactly. A model that is not patched is left alone."""
    current: Patch | None = vars(transformer_of(model)).get(_ATTRIBUTE)
    if current is not None:
        current.ledger.undo()
    return model


@contextlib.contextmanager
def patched(model: Model, *methods: Method | str | os.PathLike[str]) -> Iterator[Model]:
    """Patch for the length of a `with` block; undone on exit, also on an exception."""
    patch(model, *methods)
    try:
        yield model
    finally:
        unpatch(model)


@contextlib.contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """A patched model as it is unpatched, for the length of a `with` block; costs no examination of the model."""
    current: Patch | None = vars(transformer_of(model)).get(_ATTRIBUTE)
    with contextlib.nullcontext() if current is None else current.ledger.switched_off():
        yield


def status(model: Any) -> dict[int, dict[Kind, str]]:
    """What every patched layer computes: layer index to sublayer to rows. Empty for an unpatched model.

    `"dropped"`: nothing, or what a replacement leaves. `"chosen rows"`: those that policies name, and which part
    of all they were in the last forward pass. `"text rows"`: all but padding. `"all rows"`: padding too, by the
    model's own code, where the sublayer is none that can do without. Behind that stands how transforms change the
    scores of an attention, with the text length that it reaches then.
    """
    current: Patch | None = vars(transformer_of(model)).get(_ATTRIBUTE)
    if current is None:
        return {}
    found = {
        index: {kind: executor.computes(kind) for kind in KINDS}
        for index, executor in sorted(current.executors.items())
    }
    for index, note in current.notes.items():
        rows = found.setdefault(index, dict.fromkeys(KINDS, "all rows"))
        if rows["attention"] != "dropped":
            rows["attention"] += f", {note}"
    return found


def keep_ratios(model: Any) -> dict[tuple[int, Kind], float]:
    """Which part of the rows policies named in the last forward pass, of every sublayer where they choose."""
    current: Patch | None = vars(transformer_of(model)).get(_ATTRIBUTE)
    executors = {} if current is None else current.executors
    ratios = {(index, kind): e.keep_ratio(kind) for index, e in sorted(executors.items()) for kind in KINDS}
    return {sublayer: ratio for sublayer, ratio in ratios.items() if ratio is not None}


def _method(given: Method | str | os.PathLike[str]) -> Method:
    if isinstance(given, (str, os.PathLike)):
        return Plan.from_pretrained(given)
    if not isinstance(given, (TokenPolicy, AttentionTransform)):
        raise PlanError(
            f"Expected a method such as LayerDrop, a Plan, or where a plan is, got {type(given).__name__}."
        )
    return given


def _plan_beside_checkpoint(model: nn.Module) -> tuple[Method, ...]:
    config = getattr(model, "config", None)
    found = stored_plan(getattr(config, "name_or_path", ""), getattr(config, "_commit_hash", None))
    if found is not None:
        return (found,)
    _logger.info(
        "No plan lies beside the checkpoint, so only what loses nothing is applied. "
        "slimformer.calibrate(model, tokenizer, drop=4) makes one that is faster still."
    )
    return ()


def _apply(model: Any, methods: tuple[Method, ...], pipeline: object) -> None:
    support = examine_support(find_anatomy(model))
    anatomy = support.anatomy
    executors = _executors(support, (*methods, Unpadding()))
    dropped = [index for index, executor in executors.items() if not executor.sublayers["attention"].compute]
    slots = list(range(len(anatomy.layers)))
    if anatomy.causal:
        slots = support.slots(dropped)
    counting = slots.index(0)
    if counting in executors and executors[counting].shortens:
        raise PlanError(
            f"Positions are counted in the cache of layer {counting}, the first whose attention runs, and tokens are "
            "to leave before it. Let them leave at a later layer, or keep an attention below."
        )
    observed = _observed(anatomy, executors.values())
    ledger = Ledger()
    try:
        patch = Patch(methods, executors, ledger)
        ledger.set(model, _ATTRIBUTE, patch)
        if methods:
            ledger.set(model, "save_pretrained", partial(save_with_plan, model, methods))
        attentions = Attentions(anatomy, ledger, first_layer_call(anatomy))
        # Before layers are changed, so that rows are attended to as transforms say.
        patch.notes = transformed_by(methods, attentions)
        for executor in executors.values():
            _change_weights(executor, ledger)
        plans = [plan for executor in executors.values() for plan in executor.sublayers.values()]
        for prepare in dict.fromkeys(prepare for plan in plans for prepare in plan.prepares):
            prepare(model, ledger)
        for index, executor in executors.items():
            _add_weights(executor, ledger)
            executor.install(ledger, slots[index], index <= counting, anatomy.causal)
        for layer, slot in zip(anatomy.layers, slots, strict=True):
            core = attention_core(layer, anatomy.structure)
            if getattr(core, "layer_idx", slot) != slot:
                ledger.set(core, "layer_idx", slot)
        if anatomy.causal:
            contents = tuple(executors[i].in_cache if i in executors else "keys" for i in range(len(slots)))
            owner = CacheOwner(anatomy.layers[0], CacheLayout(tuple(slots), contents, attentions.angles))
            owner.had = ledger.set_forward(anatomy.layers[0], owner.forward)
        refuse_continuous_batching(model, executors.values(), attentions.reads_texts, ledger)
        if observed is not None:
            observed.note()
            read_stack_calls(anatomy, ledger)
        faster_pipeline(pipeline, model, ledger)
    except BaseException:
        ledger.undo()
        raise
    if not methods and support.tier != "rows":
        _logger.warning(
            "%s runs as it did: %s. LayerDrop, EarlyExit and TempScale apply to it; slimformer.support(model) says "
            "more.",
            type(anatomy.stack).__name__,
            support.reason,
        )


def _executors(support: Support, methods: tuple[Method, ...]) -> dict[int, Executor]:
    """One executor for every layer that some method touches, with the decisions of all methods."""
    anatomy = support.anatomy
    executors: dict[int, Executor] = {}

    def executor_of(index: int) -> Executor:
        if index not in executors:
            executors[index] = support.layer(index)
        return executors[index]

    for method in methods:
        if not isinstance(method, TokenPolicy):
            continue
        for (index, kind), plan in method.sublayer_plans(anatomy).items():
            executor = executor_of(index)
            executor.sublayers[kind] = executor.sublayers[kind] & plan
    first = min(
        (i for i, e in executors.items() if e.sublayers["attention"].staying), default=len(anatomy.layers)
    )
    if support.tier != "rows":
        # For `status`, which says of every layer what it computes.
        first = 0
    # Layers above get a stream that has lost rows.
    for index in range(first, len(anatomy.layers)):
        executor_of(index)
    shorter_from = min(
        (i for i, e in executors.items() if e.sublayers["attention"].leave_caches),
        default=len(anatomy.layers),
    )
    for index, executor in executors.items():
        executor.placed(anatomy, index, shorter_from)
    return executors


def _observed(anatomy: Anatomy, executors: Iterable[Executor]) -> Observed | None:
    """What says in every call whether rows may leave the stream, where any layer could let them."""
    by_rows = [executor for executor in executors if isinstance(executor, LayerExecutor)]
    if not by_rows:
        return None
    # A stack whose layers return tuples collects hidden states in its own loop.
    observed = Observed(anatomy.layers, by_rows[0].returns_tuple or not hands_on(anatomy))
    for executor in by_rows:
        executor.observed = observed
    return observed


def _add_weights(executor: Executor, ledger: Ledger) -> None:
    layer = executor.layer
    for plan in executor.sublayers.values():
        if plan.compute or plan.replacement is None:
            continue
        like = next((p for p in layer.parameters() if p.is_floating_point()), None)
        for name, value in plan.weights.items():
            if like is not None:
                value = value.to(_computing_device(layer, like), like.dtype)
            ledger.add_buffer(layer, name, value)


def _change_weights(executor: Executor, ledger: Ledger) -> None:
    layer = executor.layer
    values: dict[str, Tensor] = {}
    for plan in executor.sublayers.values():
        for name, changed in plan.changes:
            values[name] = changed(values[name] if name in values else _own_weight(layer, name))
    for name, value in values.items():
        place, _, own = name.rpartition(".")
        ledger.set_parameter(layer.get_submodule(place), own, value)


def _own_weight(layer: nn.Module, name: str) -> Tensor:
    place, _, own = name.rpartition(".")
    modules = dict(layer.named_modules())
    # An adapter passes on the weight of what it wraps, under the same name; that cannot be replaced.
    found = dict(modules[place].named_parameters(recurse=False)).get(own) if place in modules else None
    if found is None:
        raise PlanError(
            f"The plan changes {name} in {type(layer).__name__}, which has no such parameter of its own. Patch the "
            "model before adapters are put on it."
        )
    if type(found) is not nn.Parameter or found.is_meta or not found.is_floating_point():
        raise PlanError(
            f"The plan changes {name}, whose values are quantised or not in memory. Load the whole model in float32, "
            "bfloat16 or float16."
        )
    return found.detach()


def _computing_device(layer: nn.Module, like: Tensor) -> Any:
    """Where a layer computes: by accelerate's hooks if they keep its weights elsewhere and `like` on no device."""
    if like.device.type != "meta":
        return like.device
    for module in layer.modules():
        hook = getattr(module, "_hf_hook", None)
        for single in (hook, *getattr(hook, "hooks", ())):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return device
    return "cpu"

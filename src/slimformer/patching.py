"""Patch a model, undo it exactly, and say what is patched: the ledger."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias, TypeVar

from torch import nn

from slimformer.cache.layout import CacheLayout, CacheOwner
from slimformer.cache.slots import counting_slot
from slimformer.calls.depths import count_depths
from slimformer.calls.layer_calls import first_layer_call
from slimformer.calls.stack_calls import Observed, hands_on, read_stack_calls
from slimformer.changes.ledger import Ledger
from slimformer.changes.running_calls import PATCH, Block, Calls, calls_of
from slimformer.decisions.policy import TokenPolicy
from slimformer.decoding.installing import replay_calls
from slimformer.errors import PlanError
from slimformer.examination.tiers import Support, examine_support
from slimformer.methods.unpadding import Unpadding
from slimformer.model.anatomy import Anatomy, attention_core, find_anatomy, transformer_of
from slimformer.model.layer_parts import KINDS, Kind, Structure
from slimformer.plans.given import method_of, say_what_more_there_is
from slimformer.plans.plan import Plan
from slimformer.plans.stored import save_with_plan
from slimformer.runtime.continuous_batching import refuse_continuous_batching
from slimformer.runtime.embedding_pipeline import faster_pipeline
from slimformer.runtime.layer import LayerExecutor
from slimformer.runtime.layer_weights import add_weights, change_weights
from slimformer.runtime.switched_layer import SwitchedLayer
from slimformer.transforms.transform import Attentions, AttentionTransform, transformed_by
from slimformer.versions import warn_if_untried

Model = TypeVar("Model")
Method: TypeAlias = TokenPolicy | AttentionTransform
Executor: TypeAlias = LayerExecutor | SwitchedLayer
_logger = logging.getLogger("slimformer")


@dataclass
class Patch:
    """What `patch` leaves on the stack: the executors in place, the ledger, the model's calls, notes for `status`.

    Attributes:
        methods: What was applied.
        layout: What the slots of its caches hold; None where it makes no cache.
        bounds: Lengths of texts behind which a method does something once.
        reports: What `status` says of how text is generated and how batches are launched, by name.
    """

    executors: dict[int, Executor]
    ledger: Ledger
    calls: Calls
    methods: tuple[Method, ...] = ()
    notes: dict[int, str] = field(default_factory=dict)
    layout: CacheLayout | None = None
    bounds: frozenset[int] = frozenset()
    reports: dict[str, object] = field(default_factory=dict)

    def with_same_weights(self, model: Any, *more: Method, without: Method) -> tuple[Any, CacheLayout | None]:
        """Another model over the weights of this one, with the same methods but one, and some more.

        Returns:
            The model, and what the slots of its caches hold.
        """
        shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        twin = unpatch(copy.deepcopy(model, shared))
        given = [
            m for method in self.methods for m in (method.methods if isinstance(method, Plan) else (method,))
        ]
        patch(twin, *(method for method in given if method is not without), *more)
        stack = _patched_stack(twin)
        made = None if stack is None else _patch_on(stack)
        return twin, None if made is None else made.layout


class Status(dict[int, dict[Kind, str]]):
    """What every layer computes, and under `generation` how calls run, by name: those of `generate`, and the small
    batches of an encoder on a GPU; empty where as ever."""

    def __init__(self, layers: dict[int, dict[Kind, str]], generation: dict[str, str]) -> None:
        super().__init__(layers)
        self.generation = generation


def patch(model: Model, *methods: Method | str | os.PathLike[str]) -> Model:
    """Apply methods to a model, in place. A model that is patched already is unpatched first.

    Other threads may go on calling the model: calls that run end before it changes, and later ones wait for that.

    What loses nothing is always applied: no padding is computed, and on a GPU norms, rotations, activations and
    residual additions run as fused kernels.

    Args:
        model: A transformers model, or a SentenceTransformer, CrossEncoder or Pipeline that holds one. What saves it
            writes the plan beside it.
        methods: What to apply: methods, plans, or where a plan is: a folder, a file, a Hub id, or `"auto"` for beside
            the checkpoint (its folder or, where the Hub gave the model, its repository at that commit). Token policies
            compose by intersection: a sublayer computes what all of them keep. Attention transforms follow each other
            in the order given. With none, only what loses nothing is applied, and nothing is fetched.

    Returns:
        The same object.

    Raises:
        PlanError: If a method does not fit the model, or `"auto"` finds no plan; the model is left as it was.
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
    inner, chosen, anatomy = _asked(model, methods)
    calls = calls_of(anatomy.stack)
    with calls.alone(inner, anatomy.stack):
        _exchange(inner, chosen, model, calls)
    return model


def unpatch(model: Model) -> Model:
    """Undo `patch` exactly. A model that is not patched is left alone.

    What others have put on the model since stays: wrappers around a forward, weights that were loaded or trained. In a
    `patched` block the model is as unpatched to the end of the block.
    """
    inner = transformer_of(model)
    stack = _patched_stack(inner)
    if stack is not None:
        with calls_of(stack).alone(inner, stack):
            current = _patch_on(stack)
            if current is not None:
                current.ledger.undo()
    return model


@contextlib.contextmanager
def patched(model: Model, *methods: Method | str | os.PathLike[str]) -> Iterator[Model]:
    """Patch for the length of a `with` block; on exit the model is as it was, also on an exception.

    In a block inside another one, or on a patched model, only the inner methods apply; behind it the outer ones do
    again.
    """
    inner, chosen, anatomy = _asked(model, methods)
    stack = anatomy.stack
    calls = calls_of(stack)
    with calls.alone(inner, stack):
        block = Block(_exchange(inner, chosen, model, calls))
        calls.blocks.append(block)
    try:
        yield model
    finally:
        with calls.alone(inner, stack):
            place = calls.blocks.index(block)
            del calls.blocks[place]
            current = _patch_on(stack)
            if place < len(calls.blocks):
                # A block that began later, in another thread, is still open, and has switched this one's patch off.
                calls.blocks[place].outer = block.outer
            else:
                if current is not None:
                    current.ledger.switch_off()
                if block.outer is not None:
                    block.outer.switch_on(None if current is None else current.ledger)


@contextlib.contextmanager
def switched_off(model: Any) -> Iterator[None]:
    """A patched model as it is unpatched, for the length of a `with` block; costs no examination of the model.

    Other threads that call the model wait for the end of the block.
    """
    inner = transformer_of(model)
    stack = _patched_stack(inner)
    current = None if stack is None else _patch_on(stack)
    if stack is None or current is None:
        yield
        return
    with current.calls.alone(inner, stack), current.ledger.switched_off():
        yield


def status(model: Any) -> Status:
    """What every patched layer computes: layer index to sublayer to rows. Empty for an unpatched model.

    `"dropped"`: nothing, or what a replacement leaves. `"chosen rows"`: those that policies name, and which part
    of all they were in the last forward pass. `"text rows"`: all but padding. `"all rows"`: padding too, by the
    model's own code, where the sublayer is none that can do without or the layer has a forward of its own. Behind that
    stands how transforms change the scores of an attention, with the text length that it reaches then. Its attribute
    `generation` says what became of drafts, and what is replayed from CUDA graphs.
    """
    stack = _patched_stack(transformer_of(model))
    current = None if stack is None else _patch_on(stack)
    if current is None:
        return Status({}, {})
    found = {
        index: {kind: e.computes(kind) for kind in KINDS} for index, e in sorted(current.executors.items())
    }
    for index, note in current.notes.items():
        rows = found.setdefault(index, dict.fromkeys(KINDS, "all rows"))
        if rows["attention"] != "dropped":
            rows["attention"] += f", {note}"
    return Status(found, {name: str(report) for name, report in current.reports.items()})


def keep_ratios(model: Any) -> dict[tuple[int, Kind], float]:
    """Which part of the rows policies named in the last forward pass, of every sublayer where they choose."""
    stack = _patched_stack(transformer_of(model))
    current = None if stack is None else _patch_on(stack)
    executors = {} if current is None else current.executors
    ratios = {(index, kind): e.keep_ratio(kind) for index, e in sorted(executors.items()) for kind in KINDS}
    return {sublayer: ratio for sublayer, ratio in ratios.items() if ratio is not None}


def _asked(model: Any, methods: tuple[Any, ...]) -> tuple[Any, tuple[Method, ...], Anatomy]:
    inner = transformer_of(model)
    chosen = tuple(method_of(given, inner) for given in methods)
    if not chosen:
        say_what_more_there_is(inner)
    return inner, chosen, find_anatomy(inner)


def _patched_stack(model: Any) -> nn.Module | None:
    """The stack in a model that is patched, whether it was patched as this model or as a part of it."""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return next((module for module in modules if PATCH in vars(module)), None)


def _patch_on(stack: nn.Module) -> Patch | None:
    found: Patch | None = vars(stack).get(PATCH)
    return found


def _exchange(model: Any, methods: tuple[Method, ...], pipeline: object, calls: Calls) -> Ledger | None:
    """Patch a model in place of what it was patched with; returns the ledger of that, switched off."""
    stack = find_anatomy(model).stack
    previous = _patch_on(stack)
    if previous is not None:
        previous.ledger.switch_off()
    try:
        _apply(model, methods, pipeline, calls)
    except BaseException:
        if previous is not None:
            previous.ledger.switch_on()
        raise
    return None if previous is None else previous.ledger


def _apply(model: Any, methods: tuple[Method, ...], pipeline: object, calls: Calls) -> None:
    support = examine_support(find_anatomy(model))
    anatomy = support.anatomy
    executors = _executors(support, (*methods, Unpadding()))
    dropped = [index for index, executor in executors.items() if not executor.sublayers["attention"].compute]
    slots = list(range(len(anatomy.layers)))
    if anatomy.causal:
        slots = support.slots(dropped)
    counting = slots.index(counting_slot(anatomy.layer_types))
    if counting in executors and executors[counting].shortens:
        raise PlanError(
            f"Positions are counted in the cache of layer {counting}, the first whose attention runs, and tokens are "
            "to leave before it. Let them leave at a later layer, or keep an attention below."
        )
    observed = _observed(anatomy, executors.values())
    ledger = Ledger()
    try:
        patch = Patch(executors, ledger, calls, methods)
        ledger.set(anatomy.stack, PATCH, patch)
        if methods:
            ledger.stand_in(model, "save_pretrained", partial(save_with_plan, model, methods))
        attentions = Attentions(anatomy, ledger, first_layer_call(anatomy))
        # Before layers are changed, so that rows are attended to as transforms say.
        patch.notes = transformed_by(methods, attentions)
        patch.bounds = frozenset(int(length) for length in attentions.bounds if math.isfinite(length))
        for executor in executors.values():
            change_weights(executor, ledger)
        plans = [plan for executor in executors.values() for plan in executor.sublayers.values()]
        for index, executor in executors.items():
            add_weights(executor, ledger)
            executor.install(ledger, slots[index], index <= counting, anatomy.causal)
        if anatomy.repeats and any(not plan.compute for plan in plans):
            count_depths(anatomy, ledger)
        if anatomy.causal:
            for layer, slot in zip(anatomy.layers, slots, strict=True):
                for module in _in_slot(layer, anatomy.structure):
                    if module.layer_idx != slot:
                        ledger.set(module, "layer_idx", slot)
            contents = tuple(executors[i].in_cache if i in executors else "keys" for i in range(len(slots)))
            patch.layout = CacheLayout(tuple(slots), contents, attentions.angles)
            owner = CacheOwner(anatomy.layers[0], patch.layout)
            owner.had = ledger.set_forward(anatomy.layers[0], owner.forward)
        for prepare in dict.fromkeys(prepare for plan in plans for prepare in plan.prepares):
            prepare(model, ledger)
        refuse_continuous_batching(model, executors.values(), attentions.reads_texts, ledger)
        patch.reports.update(replay_calls(model, anatomy, executors, patch.bounds, ledger))
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


def _in_slot(layer: nn.Module, structure: Structure) -> list[Any]:
    """The modules that read and write a layer's cache slot: its attention, and what chooses keys for that."""
    core = attention_core(layer, structure)
    own = getattr(core, "layer_idx", None)
    within = structure.attention.of(layer)
    return [
        module for module in within.modules() if own is not None and getattr(module, "layer_idx", None) == own
    ]


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
        for (index, kind), plan in method.decisions(anatomy).items():
            executor = executor_of(index)
            executor.sublayers[kind] = executor.sublayers[kind] & plan
    first = min(
        (i for i, e in executors.items() if e.sublayers["attention"].not_evicted), default=len(anatomy.layers)
    )
    if support.tier != "rows":
        # For `status`, which says of every layer what it computes.
        first = 0
    # Layers above get a stream that has lost rows.
    for index in range(first, len(anatomy.layers)):
        executor_of(index)
    shorter_from = min(
        (i for i, e in executors.items() if e.sublayers["attention"].evict_caches),
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
    observed = Observed(anatomy.layers, not hands_on(anatomy), by_rows[0].returns_tuple)
    for executor in by_rows:
        executor.observed = observed
    return observed

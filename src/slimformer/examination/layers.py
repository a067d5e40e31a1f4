"""What is known of the layers of a model: whether each computes what its parts suggest, and how its rows can be run.

One layer of every configuration is compared with itself, on short calls of the whole stack. What was found is kept as
long as the stack lives and its layers stay as they are, so that patching again costs no comparison.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Hashable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from slimformer.calls.layer_calls import LayerCalls, adds_between, layer_calls, mirrored
from slimformer.errors import UnsupportedModelError
from slimformer.examination.attention import AttentionCall, AttentionFinding
from slimformer.examination.attention import examine as examine_attention
from slimformer.model.anatomy import Anatomy, attention_core, in_eval_mode, positional_names
from slimformer.model.layer_parts import KINDS, Structure, first_of
from slimformer.model.probes import (
    LOUD,
    Failure,
    configuration,
    error,
    float32_copy,
    in_dtype,
    noise,
    tolerance,
)
from slimformer.model.touched_modules import CalledModules, as_it_was_built
from slimformer.rows.mlp import GatedFinding
from slimformer.rows.mlp import examine as examine_mlp
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream
from slimformer.runtime.layer import LayerExecutor
from slimformer.runtime.layer_run import Run
from slimformer.runtime.sublayer_modules import SublayerModules, find_sublayer_modules
from slimformer.runtime.sublayers import RowSublayers, uses_kernels

# Texts of one call, and tokens of the longer one; longer than the first tokens that attentions treat in their own way.
_BATCH, _TOKENS = 2, 16
# How far behind the length that a model was trained for texts of one call start.
_FAR = 3


@dataclass(frozen=True)
class LayerFinding:
    """What is known of a layer.

    Attributes:
        attention: How its attention can be run for chosen rows.
        gated: How its MLP can be run in a fused form, if it can.
        returns: How many values the stack takes from the layer, the residual first; 0 for the residual alone.
        reads_padding: Whether what stands at padding changes what the layer gives for text.
        differs: How the layer differs from what its parts suggest, in words; empty where it does not.
    """

    attention: AttentionFinding
    gated: GatedFinding | None = None
    differs: str = ""
    returns: int | None = None
    reads_padding: bool = False


_Findings: TypeAlias = dict[Structure, tuple[LayerFinding, ...]]
# By stack: the state of its layers when they were examined, and what was found, by the row of the structure table.
_found: WeakKeyDictionary[nn.Module, tuple[Hashable, _Findings]] = WeakKeyDictionary()


def examine_layers(anatomy: Anatomy) -> tuple[LayerFinding, ...]:
    """What is known of every layer of a model.

    Raises:
        UnsupportedModelError: If the stack cannot be called on a few tokens.
    """
    configurations = [configuration(anatomy, index) for index in range(len(anatomy.layers))]
    state = hash((tuple(configurations), _state(anatomy)))
    known = _found.get(anatomy.stack)
    if known is None or known[0] != state:
        known = _found[anatomy.stack] = (state, {})
    if anatomy.structure in known[1]:
        return known[1][anatomy.structure]
    calls = _calls(anatomy)
    findings: dict[Hashable, LayerFinding] = {}
    for index, own in enumerate(configurations):
        if own not in findings:
            findings[own] = _examined(anatomy, index, calls)
    found = tuple(findings[own] for own in configurations)
    known[1][anatomy.structure] = found
    return found


def examine_modules(anatomy: Anatomy, calls: LayerCalls | None) -> tuple[SublayerModules, ...]:
    """The modules of every layer's sublayers, where the layers' arithmetic is not known."""
    if calls is None:
        why = dict.fromkeys((*KINDS, "block"), "its weights are not in memory")
        return tuple(SublayerModules(reasons=why) for _ in anatomy.layers)
    known: dict[Hashable, SublayerModules] = {}
    shared, supplies = _shared_modules(anatomy), _fill_stores(anatomy, calls)
    outside = not calls.passes_on and adds_between(anatomy)
    cached, keeps_states = None, False
    if calls.returns > 1 and "use_cache" in positional_names(anatomy.stack):
        try:
            kept = layer_calls(anatomy, cached=True)
            cached = kept if calls.hands_over else None
        except UnsupportedModelError:
            keeps_states = True
    found = []
    for index in range(len(anatomy.layers)):
        own = (configuration(anatomy, index), supplies[index])
        if own not in known:
            known[own] = find_sublayer_modules(anatomy, index, calls, supplies[index])
            if outside:
                part = "it is no whole layer: its stack adds what it returns to a residual of its own"
                known[own] = known[own].excluding({"block": part})
            if keeps_states:
                why_not = "its stack keeps states that layers return beside the residual"
                tuples = [
                    kind for kind, entries in known[own].silent.items() if any(e.values > 1 for e in entries)
                ]
                known[own] = known[own].excluding(dict.fromkeys(["block", *tuples], why_not))
            if cached is not None:
                known[own] = known[own].excluding(_handed_on(anatomy, index, cached, known[own]))
        found.append(known[own].without(shared, anatomy.layers[index]))
    return tuple(found)


@torch.no_grad()
def _handed_on(anatomy: Anatomy, index: int, call: LayerCalls, found: SublayerModules) -> dict[str, str]:
    """Which sublayers return a state for other layers where one is kept, as RWKV's do, and that they do, in words."""
    trial = mirrored(anatomy.layers[index], {})
    first = call.arguments[0]
    given = {
        name: copy.deepcopy(first.get(name) if value is call.beside else value)
        for name, value in call.arguments[index].items()
    }
    results: dict[str, Any] = {}
    for entry in (entry for entries in found.silent.values() for entry in entries):
        trial.get_submodule(entry.path).register_forward_hook(
            lambda module, args, output, path=entry.path: results.update({path: output})
        )
    failed = ""
    try:
        trial(call.hidden.clone(), **given)
    except Failure as failure:
        failed = f": {type(failure).__name__}: {failure}"
    reasons: dict[str, str] = {}
    for kind, entries in found.silent.items():
        for path in (entry.path for entry in entries if entry.values > 1):
            if failed or any(value is not None for value in results[path][1:]):
                reasons[kind] = f"what {path} returns beside its output goes to the layers above{failed}"
    return reasons


@torch.no_grad()
def _fill_stores(anatomy: Anatomy, calls: LayerCalls) -> list[bool]:
    """Put into the dicts that layers share what each layer finds there, and say which layers leave something."""
    stores: dict[str, MutableMapping[Any, Any]] = {}
    supplies = [False] * len(anatomy.layers)
    for index, layer in enumerate(anatomy.layers):
        given = calls.arguments[index]
        shared = {n: copy.copy(stores.get(n, v)) for n, v in given.items() if isinstance(v, MutableMapping)}
        if not shared:
            continue
        given.update(shared)
        written = {name: copy.copy(value) for name, value in shared.items()}
        arguments = {name: in_dtype(value, calls.hidden) for name, value in given.items()}
        # A layer that cannot be called alone says so where its modules are looked for.
        with contextlib.suppress(*Failure):
            mirrored(as_it_was_built(layer), {})(calls.hidden.clone(), **{**arguments, **written})
        supplies[index] = any(
            written[name].keys() != value.keys() or any(written[name][key] is not value[key] for key in value)
            for name, value in shared.items()
        )
        stores.update(written)
    return supplies


def _shared_modules(anatomy: Anatomy) -> set[int]:
    """Modules that stand in several layers: what one of these does not compute, none does."""
    seen: dict[int, int] = {}
    # A layer that stands there for several calls is one.
    for index, layer in enumerate(dict.fromkeys(anatomy.layers)):
        for module in layer.modules():
            if seen.setdefault(id(module), index) != index:
                seen[id(module)] = -1
    return {module for module, index in seen.items() if index < 0}


def row_sublayers(
    anatomy: Anatomy, index: int, finding: LayerFinding, layer: nn.Module | None = None
) -> RowSublayers:
    """How the sublayers of a layer, or of a copy of it, are run for chosen rows."""
    layer, structure = anatomy.layers[index] if layer is None else layer, anatomy.structure
    core, mlp = attention_core(layer, structure), structure.mlp.of(layer)
    attention = finding.attention.on(core)
    causal = anatomy.causal if attention is None else finding.attention.causal
    gated = None if finding.gated is None else finding.gated.on(mlp)
    names = tuple(sorted(structure.attention.children() | structure.mlp.children()))
    stack = tuple(CalledModules(other, names) for other in anatomy.layers)
    return RowSublayers(layer, structure, causal, attention, gated, stack=stack)


def _state(anatomy: Anatomy) -> Hashable:
    """What else decides whether findings still hold: where weights are and in which type, and who attends."""
    first = next(anatomy.layers.parameters())
    hooked = any(hasattr(module, "_hf_hook") for module in anatomy.layers.modules())
    implementation = getattr(anatomy.stack.config, "_attn_implementation", None)
    return (str(first.dtype), first.device.type, hooked, str(implementation), anatomy.causal)


def _calls(anatomy: Anatomy) -> list[tuple[str, LayerCalls]]:
    """Short calls of the stack: without padding, with padding in front, and with padding behind, far from the start."""
    calls: list[tuple[str, LayerCalls | None]] = [
        ("texts without padding", layer_calls(anatomy, tokens=_TOKENS, batch=_BATCH)),
        ("texts with padding in front", layer_calls(anatomy, tokens=_TOKENS, batch=_BATCH, padding="left")),
    ]
    # Only where positions are angles: a table of positions ends.
    angles = any(name.endswith("inv_freq") for name, _ in anatomy.stack.named_buffers())
    far = _FAR * _longest(anatomy.stack.config) if angles else 0
    behind = layer_calls(anatomy, tokens=_TOKENS, batch=_BATCH, padding="right", start=far)
    calls.append((f"texts with padding behind, from position {far} on", behind))
    return [(what, call) for what, call in calls if call is not None]


def _longest(config: Any) -> int:
    """The largest length that a config speaks of."""
    rope = getattr(config, "rope_parameters", None)
    parts = [rope, *rope.values()] if isinstance(rope, dict) else []
    lengths = [p.get("original_max_position_embeddings") for p in parts if isinstance(p, dict)]
    lengths += [
        getattr(config, "max_position_embeddings", None),
        getattr(config, "original_max_position_embeddings", None),
    ]
    return max((length for length in lengths if isinstance(length, int)), default=0)


@torch.no_grad()
def _examined(anatomy: Anatomy, index: int, calls: list[tuple[str, LayerCalls]]) -> LayerFinding:
    layer, structure = as_it_was_built(anatomy.layers[index]), anatomy.structure
    core = attention_core(layer, structure)
    if not structure.apart:
        return LayerFinding(AttentionFinding(reason="its sublayers cannot be computed apart"))
    if not calls or any(p.is_meta for p in layer.parameters()):
        return LayerFinding(AttentionFinding(reason="its weights are not in memory"))
    copied = float32_copy(layer)
    # In a precision in which a difference is no rounding, if it can be had.
    trial = layer if copied is None else copied
    if calls[0][1].hands_over:
        differs = "it hands more than the residual to the layers above"
    else:
        differs = _layer_differs(trial, structure, index, calls)
    if differs:
        return LayerFinding(AttentionFinding(reason=differs), differs=differs)
    heads = _attention_calls(layer, structure, core, index, calls)
    if isinstance(heads, str):
        return LayerFinding(AttentionFinding(reason=heads), differs=heads)
    attention = examine_attention(core, heads, anatomy.causal)
    differs = _rows_differ(anatomy, index, attention, trial, calls)
    if differs and attention.projections is not None:
        # Its rows are computed by its own module then.
        attention = AttentionFinding(reason=differs)
        differs = _rows_differ(anatomy, index, attention, trial, calls)
    if differs:
        return LayerFinding(AttentionFinding(reason=differs), differs=differs)
    gated = examine_mlp(structure.mlp.of(layer)) if structure.mlp.alone(layer) else None
    reads_padding = _reads_padding(trial, index, calls)
    return LayerFinding(attention, gated, returns=calls[0][1].returns, reads_padding=reads_padding)


def _layer_differs(
    trial: nn.Module, structure: Structure, index: int, calls: list[tuple[str, LayerCalls]]
) -> str:
    """How a layer's own `forward` differs from its parts run one after the other, in words."""
    for what, call, x, given in _inputs(trial, index, calls):
        if call.hidden.shape[:2] != call.text.shape:
            return "it gets other tokens than the model does"
        if call.hands_over:
            return "what it returns beside the residual goes to the layers above"
        try:
            with in_eval_mode(trial):
                expected = first_of(trial(x, **given))
                actual = first_of(LayerExecutor(trial, structure).forward(x, **given))
                mlp = _mlp_by_rows(trial, structure, x)
        # Parts that take or give something else than their names suggest raise whatever they do.
        except Exception as failure:
            return f"its parts could not be run one after the other: {type(failure).__name__}: {failure}"
        rows = call.text.flatten().to(x.device)
        off = error(actual.flatten(0, 1)[rows], expected.flatten(0, 1)[rows])
        if not off <= tolerance(x):
            return f"it computes something else with its parts: relative difference {off:.2g} for {what}"
        if not mlp <= tolerance(x):
            return f"its MLP computes a token from other tokens too: relative difference {mlp:.2g}"
    return ""


def _reads_padding(trial: nn.Module, index: int, calls: list[tuple[str, LayerCalls]]) -> bool:
    """Whether a layer's outputs for text change with what stands at padding, as behind a convolution without a mask."""
    for _, call, x, given in _inputs(trial, index, calls):
        text = call.text.to(x.device)
        if bool(text.all()):
            continue
        changed = torch.where(text[..., None], x, LOUD * noise(tuple(x.shape), x, seed=len(calls)))
        with in_eval_mode(trial):
            outputs = [first_of(trial(t, **given))[text] for t in (x, changed)]
        if not error(*outputs) <= tolerance(x):
            return True
    return False


def _rows_differ(
    anatomy: Anatomy,
    index: int,
    finding: AttentionFinding,
    trial: nn.Module,
    calls: list[tuple[str, LayerCalls]],
) -> str:
    """How sublayers of a layer that are run for chosen rows differ from all rows by its modules, in words."""
    own = row_sublayers(anatomy, index, LayerFinding(finding), trial)
    for what, call, x, given in _inputs(trial, index, calls):
        chosen = call.text.flatten().to(x.device).clone()
        chosen[1::3] = False
        rows, flat = Rows(chosen.numel(), given_mask=chosen), x.flatten(0, 1)
        with in_eval_mode(trial):
            for kind in KINDS:
                whole = Run(own.sublayers, dict(given))
                expected = whole.after(kind, x, None).flatten(0, 1)
                stream, kernels = Stream.of(x, own.causal, given), uses_kernels(flat, trial)
                run = Run(own.sublayers, dict(given), own, stream, flat=True, kernels=kernels)
                try:
                    actual = run.after(kind, flat, rows)
                except Failure as failure:
                    return f"its {kind} cannot be run for chosen rows: {type(failure).__name__}: {failure}"
                off = error(actual[chosen], expected[chosen])
                if not off <= tolerance(x):
                    return f"its {kind} gives something else for chosen rows: relative difference {off:.2g} for {what}"
    return ""


def _inputs(
    trial: nn.Module, index: int, calls: list[tuple[str, LayerCalls]]
) -> Iterator[tuple[str, LayerCalls, Tensor, dict[str, Any]]]:
    """For every call: what it is, the call, a residual `[batch, tokens, hidden]`, and the layer's other arguments."""
    weight = next((p for p in trial.parameters() if p.is_floating_point()), None)
    for number, (what, call) in enumerate(calls):
        like = call.hidden if weight is None else weight
        x = noise(tuple(call.hidden.shape), like, seed=number)
        given = {name: in_dtype(value, like) for name, value in call.arguments[index].items()}
        yield what, call, x, given


def _mlp_by_rows(layer: nn.Module, structure: Structure, x: Tensor) -> float:
    """How far the MLP of some tokens is from the same tokens' of all."""
    some, whole = x.flatten(0, 1)[1::3], structure.mlp.by_token(layer, x).flatten(0, 1)[1::3]
    return error(structure.mlp.by_token(layer, some[None])[0], whole)


class _Reached(Exception):
    """Carries an attention's arguments out of its layer."""


def _attention_calls(
    layer: nn.Module, structure: Structure, core: nn.Module, index: int, calls: list[tuple[str, LayerCalls]]
) -> list[AttentionCall] | str:
    """What the attention of a layer gets in calls of the stack; in words how its input is not the one expected."""
    found: list[AttentionCall] = []
    for what, call in calls:
        stub = nn.Module()
        given: dict[str, Any] = {}

        def reached(*args: Any, given: dict[str, Any] = given, **kwargs: Any) -> None:
            given.update(zip(positional_names(core), args, strict=False), **kwargs)
            raise _Reached

        stub.__dict__["forward"] = reached
        mirror = mirrored(layer, {id(core): stub})
        try:
            mirror(call.hidden, **call.arguments[index])
        except _Reached:
            came = given.pop(positional_names(core)[0], None)
            if not isinstance(came, Tensor) or not _is_heads_input(layer, structure, call.hidden, came):
                return "its attention reads something else than the residual behind the norm in front of it"
            found.append(AttentionCall(given, call.text, what))
    return found


def _is_heads_input(layer: nn.Module, structure: Structure, hidden: Tensor, came: Tensor) -> bool:
    """Whether what an attention got is what queries, keys and values are to be made of."""
    try:
        expected = structure.heads_input(layer, hidden)
    except AttributeError:
        return False
    return came.shape == expected.shape and error(came.flatten(0, -2), expected.flatten(0, -2)) <= tolerance(
        came
    )

"""Which patched models have steps or batches that can be replayed, and putting in place what replays them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from slimformer.changes.ledger import Ledger
from slimformer.decisions.selection import compares_tokens
from slimformer.decoding.batching import Batching
from slimformer.decoding.capture import may_capture
from slimformer.decoding.stepping import Stepping
from slimformer.model.anatomy import Anatomy
from slimformer.runtime.layer import LayerExecutor

# What makes the cache of a call of `generate`.
_ENTRY = "_prepare_cache_for_generation"


def replay_calls(
    model: Any, anatomy: Anatomy, executors: Mapping[int, Any], bounds: frozenset[int], ledger: Ledger
) -> dict[str, object]:
    """Let calls be replayed from graphs, where there is a device that has them: decode steps, or encoders' batches.

    Args:
        model: The model.
        anatomy: Its layers.
        executors: What runs them.
        bounds: Lengths of texts behind which a transform does something once.
        ledger: Where changes are written down.

    Returns:
        What says to `status` how they ran, by name; empty where nothing was put in place.
    """
    if not may_capture():
        return {}
    if not anatomy.causal:
        return {"batches": _replay_batches(anatomy, executors, bounds, ledger)}
    if not callable(getattr(model, _ENTRY, None)):
        return {}
    return {"steps": _replay_steps(model, anatomy, executors, bounds, ledger)}


def _replay_steps(
    model: Any, anatomy: Anatomy, executors: Mapping[int, Any], bounds: frozenset[int], ledger: Ledger
) -> Stepping:
    """Of `generate`."""
    never = _why_never(model, anatomy, executors)
    stepping = Stepping(model, Untouched(model, _by_rows(executors)), never, bounds)
    if never:
        return stepping
    stepping.had = ledger.set_forward(model, stepping)
    stepping.had_cache = ledger.set_method(model, _ENTRY, stepping.caches)
    stepping.had_generate = ledger.set_method(model, "generate", stepping.generates)
    ledger.changes.append(_Memory(stepping.rooms.clear))
    return stepping


def _replay_batches(
    anatomy: Anatomy, executors: Mapping[int, Any], bounds: frozenset[int], ledger: Ledger
) -> Batching:
    """Of an encoder's stack."""
    never = _why_never(anatomy.stack, anatomy, executors) or _why_no_batch(anatomy, executors, bounds)
    batching = Batching(anatomy.stack, Untouched(anatomy.stack, _by_rows(executors)), never)
    if never:
        return batching
    batching.had = ledger.set_forward(anatomy.stack, batching)
    ledger.changes.append(_Memory(batching.forget))
    return batching


def _by_rows(executors: Mapping[int, Any]) -> list[LayerExecutor]:
    return [executor for executor in executors.values() if isinstance(executor, LayerExecutor)]


@dataclass
class Untouched:
    """Says whether nobody has put hooks, or modules of his own, into a model since it was patched."""

    model: nn.Module
    layers: list[LayerExecutor]

    def __call__(self) -> bool:
        """Whether a graph runs what the model would run."""
        for module in self.model.modules():
            if module is self.model:
                # Its hooks run around the whole call.
                continue
            if module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"):
                return False
        return not any(part.called.touched() for layer in self.layers for part in layer.parts.values())


@dataclass
class _Memory:
    """The change that undone gives memory back."""

    forget: Callable[[], None]

    def undo(self) -> None:
        self.forget()

    def redo(self) -> None:
        """It is taken again as need be."""


def _why_never(model: Any, anatomy: Anatomy, executors: Mapping[int, Any]) -> str:
    """Why no call can be replayed, step or batch; empty where some may be."""
    if anatomy.repeats or model.config.is_encoder_decoder:
        return "its layers are called several times, or attend to an encoder"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "it lies on several devices"
    for index in range(len(anatomy.layers)):
        executor = executors.get(index)
        if not isinstance(executor, LayerExecutor) or executor.foreign or executor.by_rows is None:
            return f"the arithmetic of layer {index} is not known"
        # Those that let tokens leave are asked in prompts alone.
        if compares_tokens(select for plan in executor.sublayers.values() for select in plan.rows):
            return "tokens are chosen among those of a whole text"
        if executor.sublayers["attention"].compute and executor.by_rows.attention is None:
            return f"the attention of layer {index} is not known"
    return ""


def _why_no_batch(anatomy: Anatomy, executors: Mapping[int, Any], bounds: frozenset[int]) -> str:
    """Why no batch of an encoder can be replayed beside what forbids that of steps; empty where some may be."""
    if anatomy.reads_padding:
        return "what it gives for a text depends on the padding behind it"
    if bounds:
        return "a method does something once for texts of some length"
    for index, executor in sorted(executors.items()):
        # A graph is replayed on texts of other lengths, and what is decided by values keeps to those that it had.
        if executor.chooses or executor.compares:
            return f"tokens are chosen in layer {index}"
        attention = executor.by_rows.attention
        if attention is not None and attention.transformed is not None:
            return f"the scores of layer {index} depend on how long texts are"
    return ""

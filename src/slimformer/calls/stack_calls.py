"""What the loop over the layers does to the residual between them, and which masks its caller made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.output_capturing import _active_collector

from slimformer.cache.slots import CACHE_NAMES
from slimformer.calls.layer_calls import layer_calls
from slimformer.changes.ledger import Ledger
from slimformer.model.anatomy import Anatomy, named_arguments, positional_names
from slimformer.model.touched_modules import has_own_forward, is_hooked

# Arguments of stacks that say what the first layer gets, what layers get beside it, or what is returned.
_NOT_BETWEEN_LAYERS = frozenset({
    *CACHE_NAMES, "input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "cache_position",
    "use_cache", "output_attentions", "output_hidden_states", "return_dict", "logits_to_keep", "labels",
    "task_type_ids", "mm_token_type_ids",
})  # fmt: skip
_RECORDED = ("output_hidden_states", "output_attentions")


@dataclass(frozen=True)
class _StackCall:
    """One call of a stack.

    Attributes:
        masks: Masks over queries and keys that the caller made, which the stack hands to layers as they are.
        features: Whether there are arguments that the stack may put between its layers.
        positions: The position of every token, `[1 or batch, tokens]`, where the caller says it.
        keys: Which keys are text, flags `[batch, keys]`, where the caller says it.
        records: Whether hidden states or attention weights may be asked for, which some stacks collect in their loop.
    """

    masks: tuple[Tensor, ...] = ()
    features: bool = False
    positions: Tensor | None = None
    keys: Tensor | None = None
    records: bool = True


# Also of a loop over the layers that somebody calls without the stack around it.
_NOTHING = _StackCall()
# Of the forward pass that runs in this thread or task.
_current: ContextVar[_StackCall] = ContextVar("slimformer_stack_call", default=_NOTHING)


@dataclass(eq=False)
class _Traced:
    """The forward pass that is being traced into one graph, in which older compilers follow no context variable."""

    call: _StackCall | None = None


_traced = _Traced()


def _running() -> _StackCall:
    traced = _traced.call if torch.compiler.is_compiling() else None
    return _current.get() if traced is None else traced


def callers_masks() -> tuple[Tensor, ...]:
    """The masks over queries and keys that the caller of the stack made for the forward pass that runs."""
    return _running().masks


def callers_positions() -> Tensor | None:
    """The position of every token, `[1 or batch, tokens]`, as the caller of the stack gave them."""
    return _running().positions


def callers_keys() -> Tensor | None:
    """Which keys are text, flags `[batch, keys]`, as the caller of the stack says: all keys, whatever windows hide."""
    return _running().keys


def may_record() -> bool:
    """Whether the stack that runs may have been asked for what is between its layers."""
    return _running().records


def puts_features_between() -> bool:
    """Whether the stack that runs got arguments that it may put between its layers, at tokens of the batch."""
    return _running().features


@dataclass(eq=False)
class StackReader:
    """Stands in for a stack's `forward`, and notes what its layers are not told while it runs.

    Attributes:
        names: Its positional parameters.
        config: The model's, which says what is returned where arguments do not.
        had: The stack's own.
    """

    names: tuple[str, ...]
    config: Any
    had: Callable[..., Any] = field(init=False)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The stack's own `forward`, whose signature tells others what they may pass."""
        return self.had

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stack's own `forward`, with the same arguments."""
        call = self._noted(named_arguments(self.names, args, kwargs))
        if torch.compiler.is_compiling():
            outer, _traced.call = _traced.call, call
            try:
                return self.had(*args, **kwargs)
            finally:
                _traced.call = outer
        token = _current.set(call)
        try:
            return self.had(*args, **kwargs)
        finally:
            _current.reset(token)

    def _noted(self, given: Mapping[str, Any]) -> _StackCall:
        mask = given.get("attention_mask")
        masks = tuple(mask.values()) if isinstance(mask, Mapping) else (mask,)
        own = tuple(m for m in masks if isinstance(m, Tensor) and m.dim() == 4)
        features = any(given.get(name) is not None for name in self.names if name not in _NOT_BETWEEN_LAYERS)
        asked = (given.get(name) for name in _RECORDED)
        records = any(
            getattr(self.config, name, False) if value is None else value
            for name, value in zip(_RECORDED, asked, strict=True)
        )
        return _StackCall(own, features, _flat(given.get("position_ids")), _flat(mask), records)


def _flat(value: Any) -> Tensor | None:
    return value if isinstance(value, Tensor) and value.dim() == 2 else None


def read_stack_calls(anatomy: Anatomy, ledger: Ledger) -> None:
    """Let layers know, in every forward pass, what the stack does beside calling them."""
    reader = StackReader(positional_names(anatomy.stack), anatomy.stack.config)
    reader.had = ledger.set_forward(anatomy.stack, reader)


def hands_on(anatomy: Anatomy) -> bool:
    """Whether every layer of a stack gets the very tensor that the layer before it returned.

    What a stack adds, scales or indexes between its layers, it does to all tokens of the batch, by position.
    """
    calls = layer_calls(anatomy)
    return calls is None or calls.passes_on


@dataclass(eq=False)
class Observed:
    """Says, in a call, whether something reads or changes what runs between the layers, so that no row may leave.

    Attributes:
        layers: The model's layers.
        by_the_stack: Whether the loop over the layers does it always.
        in_the_loop: Whether that loop collects by itself what the caller asked for.
        foreign: Layers that had a `forward` of somebody else's before they were patched.
        forwards: The `forward` that each other layer was given, by its index.
    """

    layers: nn.ModuleList
    by_the_stack: bool
    in_the_loop: bool
    foreign: frozenset[int] = field(init=False)
    forwards: dict[int, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.foreign = frozenset(i for i, layer in enumerate(self.layers) if has_own_forward(layer))

    def note(self) -> None:
        """Take the `forward` that layers have now for the patched one: one put there later is somebody else's."""
        for index, layer in enumerate(self.layers):
            if index not in self.foreign:
                self.forwards[index] = vars(layer).get("forward")

    def __call__(self) -> bool:
        """Whether hooks, wrappers, recorded outputs or the stack itself do."""
        if self.by_the_stack or self.foreign or _active_collector.get() or puts_features_between():
            return True
        if self.in_the_loop and may_record():
            return True
        # Equal, not the same: a copied model has its own bound methods.
        return any(
            is_hooked(layer) or vars(layer).get("forward") != self.forwards.get(index)
            for index, layer in enumerate(self.layers)
        )

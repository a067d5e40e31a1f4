"""Which call of a layer this is, where one forward pass of a stack calls the same layer at several depths.

The count belongs to the forward pass that runs, in the thread or task in which it runs, so that passes in other
threads, and those that ended in an exception, have no part in it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from slimformer.changes.ledger import Ledger
from slimformer.errors import SlimformerError
from slimformer.model.anatomy import Anatomy


@dataclass(eq=False)
class _Pass:
    """One forward pass: how many calls of layers have begun, and the depth of the one that runs."""

    begun: int = 0
    depth: int | None = None


_running: ContextVar[_Pass | None] = ContextVar("slimformer_depths", default=None)


class _Traced:
    """The pass that torch.compile traces, which can follow no context variable; never read outside of a trace."""

    current: _Pass | None = None


_traced = _Traced()


def _current() -> _Pass | None:
    """The pass that runs here; None outside of one."""
    return _traced.current if torch.compiler.is_compiling() else _running.get()


def count_depths(anatomy: Anatomy, ledger: Ledger) -> None:
    """Let every layer of a stack know at which depth it is called; what stands in for it at some comes before this."""
    name, at = type(anatomy.stack).__name__, dict[nn.Module, list[int]]()
    for depth, layer in enumerate(anatomy.layers):
        at.setdefault(layer, []).append(depth)
    for layer, depths in at.items():
        counted = _CountedLayer(tuple(depths), name)
        counted.had = ledger.set_forward(layer, counted)
    stack = _CountedStack(len(anatomy.layers), name)
    stack.had = ledger.set_forward(anatomy.stack, stack)


def stand_in(ledger: Ledger, module: nn.Module, call: Callable[..., Any], depth: int | None) -> None:
    """Let `call` stand in for a module's `forward`, at one depth where its layer is called at several."""
    if depth is None:
        ledger.set_forward(module, call)
        return
    at_depth = _AtDepth(depth, call, type(module).__name__)
    at_depth.had = ledger.set_forward(module, at_depth)


@dataclass(eq=False)
class _CountedStack:
    """Stands in for a stack's `forward`, and begins a pass.

    Attributes:
        count: How many calls of layers a pass has.
        name: The class of the stack.
        had: The stack's own.
    """

    count: int
    name: str
    had: Callable[..., Any] = field(init=False)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The stack's own `forward`, whose signature tells others what they may pass."""
        return self.had

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stack's own `forward`, with the same arguments.

        Raises:
            SlimformerError: If it called fewer layers than when the model was patched.
        """
        current = _Pass()
        if torch.compiler.is_compiling():
            outer, _traced.current = _traced.current, current
            try:
                output = self.had(*args, **kwargs)
            finally:
                _traced.current = outer
        else:
            token = _running.set(current)
            try:
                output = self.had(*args, **kwargs)
            finally:
                _running.reset(token)
        if current.begun != self.count:
            raise _otherwise(self.name, f"{current.begun} layers, and {self.count}")
        return output


@dataclass(eq=False)
class _CountedLayer:
    """Stands in for the `forward` of a layer that is called several times, and knows which call this is.

    Attributes:
        at: The depths at which the layer is called.
        name: The class of the stack.
        had: The layer's own, or what stands in for it at some depth.
    """

    at: tuple[int, ...]
    name: str
    had: Callable[..., Any] = field(init=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer at this depth.

        Raises:
            SlimformerError: If another layer was called at this depth when the model was patched.
        """
        current = _current()
        if current is None:
            return self.had(*args, **kwargs)
        depth = current.begun
        if depth not in self.at:
            raise _otherwise(self.name, f"another layer at depth {depth} than")
        outer, current.begun, current.depth = current.depth, depth + 1, depth
        try:
            return self.had(*args, **kwargs)
        finally:
            current.depth = outer


@dataclass(eq=False)
class _AtDepth:
    """Stands in for a `forward` at one depth, and is that `forward` at every other.

    Attributes:
        depth: Which.
        call: What stands in.
        module: The class of what is called.
        had: The `forward`.
    """

    depth: int
    call: Callable[..., Any]
    module: str
    had: Callable[..., Any] = field(init=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As what stands in, or as the `forward`.

        Raises:
            SlimformerError: If no pass of the stack runs here, so that the depth is not known.
        """
        current = _current()
        if current is None or current.depth is None:
            raise SlimformerError(
                f"This {self.module} is called at several depths of its model, of which a patch leaves some out, and "
                "it was called by itself, or again for gradient checkpointing, so that its depth is not known. Call "
                "the whole model, put checkpoints around the whole of it, or unpatch it first."
            )
        forward = self.call if current.depth == self.depth else self.had
        return forward(*args, **kwargs)


def _otherwise(stack: str, what: str) -> SlimformerError:
    return SlimformerError(
        f"{stack} called {what} when the model was patched, so that what was to be left out is not known. Unpatch the "
        "model before its config or its layers are changed, and patch it again."
    )

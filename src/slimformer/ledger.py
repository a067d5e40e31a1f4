"""Changes to a model that can be undone exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn


@dataclass
class Ledger:
    """Every change to the model, in order, so that it can be undone backwards."""

    undone_by: list[Callable[[], None]] = field(default_factory=list)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set `target.name` and remember what stood in its own `__dict__` before."""
        had, old = name in vars(target), vars(target).get(name)
        self.undone_by.append(partial(setattr, target, name, old) if had else partial(delattr, target, name))
        setattr(target, name, value)

    def set_forward(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Set a layer's `forward`, inside the hooks that accelerate wraps around it; returns the one it had."""
        # accelerate's hooks wrap the forward they saved here; theirs must stay outermost.
        name = "_old_forward" if "_old_forward" in vars(layer) else "forward"
        had: Callable[..., Any] = getattr(layer, name)
        self.set(layer, name, forward)
        return had

    def add_buffer(self, layer: nn.Module, name: str, value: Tensor) -> None:
        """Put a tensor on a layer that moves with it and that its `state_dict` leaves out."""
        layer.register_buffer(name, value, persistent=False)
        self.undone_by.append(partial(delattr, layer, name))

    def undo(self) -> None:
        """Put everything back, newest first."""
        while self.undone_by:
            self.undone_by.pop()()

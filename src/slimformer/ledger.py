"""Changes to a model that can be undone exactly, and switched off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


class Change(Protocol):
    """One change that was made."""

    def undo(self) -> None:
        """Put back what was there."""
        ...

    def redo(self) -> None:
        """Make the change again, as it was when it was undone."""
        ...


@dataclass
class Ledger:
    """Every change to the model, in order, so that it can be undone backwards."""

    changes: list[Change] = field(default_factory=list)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set `target.name` and remember what stood in its own `__dict__` before."""
        self.changes.append(_Attribute(target, name, name in vars(target), vars(target).get(name)))
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
        self.changes.append(_Buffer(layer, name))

    def set_parameter(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Let a module compute with `value` in place of one of its parameters, whose old tensor is kept aside.

        The module's `state_dict` goes on giving the old one.
        """
        change = _Parameter(module, name, module.get_parameter(name))
        change.set(value)
        self.changes.append(change)

    def undo(self) -> None:
        """Put everything back, newest first."""
        while self.changes:
            self.changes.pop().undo()

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """The model as it was before all changes, for the length of a `with` block."""
        undone: list[Change] = []
        try:
            for change in reversed(self.changes):
                change.undo()
                undone.append(change)
            yield
        finally:
            while undone:
                undone.pop().redo()


@dataclass
class _Attribute:
    target: Any
    name: str
    had: bool
    old: Any
    new: Any = None

    def undo(self) -> None:
        self.new = vars(self.target).get(self.name)
        if self.had:
            setattr(self.target, self.name, self.old)
        else:
            delattr(self.target, self.name)

    def redo(self) -> None:
        setattr(self.target, self.name, self.new)


@dataclass
class _Buffer:
    layer: nn.Module
    name: str
    value: Tensor | None = None

    def undo(self) -> None:
        self.value = self.layer.get_buffer(self.name)
        delattr(self.layer, self.name)

    def redo(self) -> None:
        self.layer.register_buffer(self.name, self.value, persistent=False)


@dataclass
class _Parameter:
    module: nn.Module
    name: str
    old: nn.Parameter
    new: nn.Parameter | None = None
    hook: Any = None

    def set(self, value: Tensor) -> None:
        self.new = nn.Parameter(value, requires_grad=self.old.requires_grad)
        self.redo()

    def undo(self) -> None:
        self.new = self.module.get_parameter(self.name)
        aside = self.module.get_buffer(_aside(self.name))
        if aside is not self.old:
            # The model was moved or cast meanwhile, which makes new tensors of buffers.
            self.old.data = aside.detach()
        self.hook.remove()
        delattr(self.module, _aside(self.name))
        self.module.register_parameter(self.name, self.old)

    def redo(self) -> None:
        # As a buffer it moves with the module.
        self.module.register_buffer(_aside(self.name), self.old, persistent=False)
        self.module.register_parameter(self.name, self.new)
        self.hook = self.module.register_state_dict_post_hook(_SavesOld(self.name))


@dataclass
class _SavesOld:
    name: str

    def __call__(self, module: nn.Module, state: dict[str, Any], lead: str, metadata: Any) -> None:
        old = module.get_buffer(_aside(self.name))
        if lead + self.name in state:
            state[lead + self.name] = old.detach()


def _aside(name: str) -> str:
    return f"slimformer_own_{name}"

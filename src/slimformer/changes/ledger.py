"""Changes to a model that can be undone exactly, and switched off for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from slimformer.changes.changed_parameter import ChangedParameter

# Where accelerate keeps the forward that its hooks wrap.
_HOOKED = "_old_forward"


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
    """Every change to the model, in order, so that it can be undone backwards.

    What others have put on top of a change in the meantime stays where it is.
    """

    changes: list[Change] = field(default_factory=list)
    _off: list[Change] = field(default_factory=list)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Set `target.name` and remember what stood in its own `__dict__` before."""
        self.changes.append(_Attribute(target, name, name in vars(target), vars(target).get(name), value))
        setattr(target, name, value)

    def stand_in(
        self, target: Any, name: str, call: Callable[..., Any], in_front: bool = False
    ) -> Callable[..., Any]:
        """Let `call` stand in for the method `target.name`; returns the method that was there.

        One `in_front` stays before whatever is set later, which becomes its attribute `had`.
        """
        had: Callable[..., Any] = getattr(target, name)
        standing_in = StandIn(call, had, name in vars(target), in_front)
        self.changes.append(_Method(target, name, standing_in))
        setattr(target, name, standing_in)
        return had

    def set_forward(self, layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Set a layer's `forward`, inside the hooks that accelerate wraps around it; returns the one it had."""
        return self.set_method(layer, method_place(layer, "forward"), forward)

    def set_method(self, target: Any, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Let `call` stand in for `target.name`, behind what stays in front of it; returns the method it had."""
        front = vars(target).get(name)
        if isinstance(front, StandIn) and front.in_front:
            return self.stand_in(front.call, "had", call)
        return self.stand_in(target, name, call)

    def add_buffer(self, layer: nn.Module, name: str, value: Tensor) -> None:
        """Put a tensor on a layer that moves with it and that its `state_dict` leaves out."""
        layer.register_buffer(name, value, persistent=False)
        self.changes.append(_Buffer(layer, name))

    def change_parameter(self, module: nn.Module, name: str, changed: Callable[[Tensor], Tensor]) -> None:
        """Let a module compute with `changed` of one of its parameters; see `ChangedParameter`."""
        change = ChangedParameter(module, name, changed, module.get_parameter(name))
        change.redo()
        self.changes.append(change)

    def undo(self) -> None:
        """Put everything back, newest first."""
        self._off.clear()
        while self.changes:
            self.changes.pop().undo()

    def switch_off(self) -> None:
        """Put everything back, to be made again by `switch_on`."""
        for change in reversed(self.changes):
            change.undo()
            self._off.append(change)

    def switch_on(self, after: Ledger | None = None) -> None:
        """Make everything again that was switched off, in place of what another ledger has switched off since."""
        for later in () if after is None else after.changes:
            if isinstance(later, _Method) and later.place is None:
                for change in self._off:
                    if isinstance(change, _Method):
                        change.go_below(later)
        while self._off:
            self._off.pop().redo()

    @contextlib.contextmanager
    def switched_off(self) -> Iterator[None]:
        """The model as it was before all changes, for the length of a `with` block."""
        try:
            self.switch_off()
            yield
        finally:
            self.switch_on()


def has_own(target: Any, name: str) -> bool:
    """Whether somebody has given an object another method of this name than its class has."""
    own = vars(target).get(method_place(target, name))
    while isinstance(own, StandIn):
        if not own.own:
            return False
        own = own.had
    if own is None:
        return False
    plain = getattr(type(target), name, None)
    return not (getattr(own, "__self__", None) is target and getattr(own, "__func__", None) is plain)


def method_place(target: Any, name: str) -> str:
    """The attribute in which a method is to be replaced: for `forward`, inside the hooks of accelerate."""
    return _HOOKED if name == "forward" and _HOOKED in vars(target) else name


class StandIn:
    """What takes the place of a method, and passes calls on to it once it is undone.

    Whoever has wrapped it in the meantime keeps a wrapper that works.

    Attributes:
        call: What stands in.
        had: The method.
        own: Whether it was the object's own, not its class's.
        in_front: Whether what is set later goes behind it.
        active: Whether it does stand in.
    """

    def __init__(self, call: Any, had: Callable[..., Any], own: bool, in_front: bool = False) -> None:
        self.call, self.had, self.own, self.in_front, self.active = call, had, own, in_front, True

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method, whose signature tells others what they may pass."""
        return self.had

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method's result or that of what stands in."""
        return self.call(*args, **kwargs) if self.active else self.had(*args, **kwargs)

    def below(self) -> tuple[Callable[..., Any], bool]:
        """What comes back when this goes, and whether it is the object's own: not what has been undone before."""
        if isinstance(self.had, StandIn) and not self.had.active:
            return self.had.below()
        return self.had, self.own


@dataclass
class _Method:
    target: Any
    name: str
    standing_in: StandIn
    place: str | None = None

    def undo(self) -> None:
        self.standing_in.active = False
        attributes = vars(self.target)
        # Hooks may have moved it since; and where somebody wrapped it, theirs is not ours to take away.
        places = (self.name, "forward", _HOOKED)
        self.place = next((name for name in places if attributes.get(name) is self.standing_in), None)
        had, own = self.standing_in.below()
        if self.place == self.name and not own:
            delattr(self.target, self.name)
        elif self.place is not None:
            setattr(self.target, self.place, had)

    def go_below(self, later: _Method) -> None:
        """Stand where another one stood that somebody has wrapped."""
        if self.target is later.target and self.place is not None and _plain(self.name) == _plain(later.name):
            later.standing_in.had, self.place = self.standing_in, None

    def redo(self) -> None:
        if self.place is not None:
            # Hooks that came or went while it was off have moved what stood there.
            setattr(self.target, method_place(self.target, _plain(self.name)), self.standing_in)
        self.standing_in.active = True


def _plain(name: str) -> str:
    return "forward" if name == _HOOKED else name


@dataclass
class _Attribute:
    target: Any
    name: str
    had: bool
    old: Any
    new: Any
    taken: bool = False

    def undo(self) -> None:
        current = vars(self.target).get(self.name)
        self.taken = not _same(current, self.new)
        if self.taken:
            return
        if self.had:
            setattr(self.target, self.name, self.old)
        else:
            delattr(self.target, self.name)

    def redo(self) -> None:
        if not self.taken:
            setattr(self.target, self.name, self.new)


def _same(one: Any, other: Any) -> bool:
    # Numbers and texts come out of a pickle as equal ones.
    return one is other or (type(one) is type(other) and isinstance(one, (int, float, str)) and one == other)


@dataclass
class _Buffer:
    layer: nn.Module
    name: str
    value: Tensor | None = None

    def undo(self) -> None:
        self.value = self.layer.get_buffer(self.name)
        delattr(self.layer, self.name)

    def redo(self) -> None:
        like = next((p for p in self.layer.parameters() if p.is_floating_point()), None)
        if self.value is not None and like is not None and not like.is_meta:
            # The layer was moved or cast meanwhile.
            self.value = self.value.to(like.device, like.dtype)
        self.layer.register_buffer(self.name, self.value, persistent=False)

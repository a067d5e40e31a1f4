"""A call ends on the model that it began on: changes in one thread and calls in others wait for each other."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from slimformer.changes.call_context import carry_into_recomputation
from slimformer.changes.ledger import Ledger, method_place
from slimformer.errors import SlimformerError

# How often a change looks whether calls that run have ended, in seconds.
_LOOK_EVERY = 1e-3
# What runs in a module whose call has begun: `nn.Module.__call__` leads to `_call_impl`.
_CALLS = {"_call_impl", "__call__", "forward", "generate"}
# Where a stack carries its patch.
PATCH = "_slimformer"


class Calls:
    """Who may call one model now.

    Nothing is counted while a model is called, since a call of the unpatched model has nobody who could count it: a
    change looks for the model in what the other threads run.

    Attributes:
        gates: What lets no call in while the model is changed.
        ledger: Takes them away.
        blocks: What `patched` blocks that are open have switched off, outermost first.
    """

    def __init__(self) -> None:
        self.gates: list[Gate] = []
        self.ledger = Ledger()
        self.blocks: list[Block] = []
        self._condition = threading.Condition()
        self._holder: int | None = None
        self._depth = 0
        self._waiting: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles are those of another model, which nobody calls."""
        return {"gates": self.gates, "ledger": self.ledger}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As `__getstate__` says."""
        vars(self).update(vars(Calls()), **state)

    @property
    def closed(self) -> bool:
        """Whether the model is being changed by another thread."""
        return self._holder is not None and self._holder != threading.get_ident()

    @contextlib.contextmanager
    def alone(self, model: nn.Module, stack: nn.Module) -> Iterator[None]:
        """A block in which no other thread calls the model; calls that run end before, others begin after it.

        Args:
            model: The model.
            stack: Its stack.

        Raises:
            SlimformerError: If this thread and others are in the middle of calls, so that they would wait for ever.
        """
        me = threading.get_ident()
        with self._condition:
            while self.closed:
                if _runs(sys._getframe(1), (model, stack)):
                    raise _inside_a_call(model)
                self._wait_for_change(me)
            self._holder, self._depth = me, self._depth + 1
        try:
            for target, name in ((stack, "forward"), (model, "generate")):
                self._put_gate(model, stack, target, name)
            if self._depth == 1:
                self._wait_for_others(me, model, stack)
            yield
        finally:
            with self._condition:
                self._depth -= 1
                if self._depth == 0:
                    self._settle(stack)
                    self._holder = None
                    self._condition.notify_all()

    def through(self, gate: Gate) -> Callable[..., Any]:
        """Wait for the end of a change; returns what is behind the gate then."""
        with self._condition:
            while self.closed:
                self._wait_for_change(threading.get_ident())
            # The model may have been unpatched, and patched anew.
            return next(
                (g.had for g in self.gates if g.target is gate.target and g.name == gate.name), gate.had
            )

    def _put_gate(self, model: nn.Module, stack: nn.Module, target: nn.Module, name: str) -> None:
        if any(gate.target is target and gate.name == name for gate in self.gates):
            return
        if callable(getattr(target, name, None)):
            gate = Gate(self, model, stack, target, name)
            gate.had = self.ledger.stand_in(target, method_place(target, name), gate, in_front=True)
            self.gates.append(gate)

    def _settle(self, stack: nn.Module) -> None:
        with _lock:
            if PATCH in vars(stack) or self.blocks:
                # What is patched holds its calls itself: here the gates would keep the model for ever.
                _of_stacks.pop(stack, None)
                return
            _of_stacks[stack] = self
        self.ledger.undo()
        self.gates.clear()

    def _wait_for_change(self, me: int) -> None:
        self._waiting.add(me)
        self._condition.wait()
        self._waiting.discard(me)

    def _wait_for_others(self, me: int, model: nn.Module, stack: nn.Module) -> None:
        while True:
            frames = sys._current_frames()
            own = frames.pop(me)
            running = any(
                thread not in self._waiting and _runs(frame, (model, stack))
                for thread, frame in frames.items()
            )
            # Frames keep what they compute with alive.
            del frames
            if not running:
                return
            if _runs(own, (model, stack)):
                raise _inside_a_call(model)
            time.sleep(_LOOK_EVERY)


@dataclass
class Block:
    """A `patched` block.

    Attributes:
        outer: The ledger of what was on the model when the block began, and is put back when it ends.
    """

    outer: Ledger | None


@dataclass
class Gate:
    """Stands in for a model's `generate` or a stack's `forward`, and lets no call in while the model is changed.

    Attributes:
        calls: Those of the model.
        model: The model.
        stack: Its stack.
        target: Which of the two has the method.
        name: Of the method.
        had: What is behind the gate: the method, or what stands in for it.
    """

    calls: Calls
    model: nn.Module
    stack: nn.Module
    target: nn.Module
    name: str
    had: Callable[..., Any] = field(init=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The method, as it is once the change is made."""
        if torch.compiler.is_compiling():
            return self.had(*args, **kwargs)
        if self.calls.closed and not self._inside():
            return self.calls.through(self)(*args, **kwargs)
        if self.target is self.stack and self.stack.training and torch.is_grad_enabled():
            carry_into_recomputation(self.stack, self.calls.ledger)
        return self.had(*args, **kwargs)

    def _inside(self) -> bool:
        """Whether this call is part of one that began before, for which the change waits."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if _is_call(frame, (self.stack,), {"forward"}) or _is_call(frame, (self.model,), {"generate"}):
                return True
            frame = frame.f_back
        return False


def _inside_a_call(model: nn.Module) -> SlimformerError:
    return SlimformerError(
        f"This {type(model).__name__} was to be patched or unpatched from inside one of its calls while another thread "
        "uses it too. Do it outside of calls, or let one thread at a time use the model."
    )


def _runs(frame: FrameType | None, modules: tuple[nn.Module, ...]) -> bool:
    while frame is not None:
        if _is_call(frame, modules, _CALLS):
            return True
        frame = frame.f_back
    return False


def _is_call(frame: FrameType, modules: tuple[nn.Module, ...], names: set[str]) -> bool:
    if frame.f_code.co_name not in names:
        return False
    called = frame.f_locals.get("self")
    return any((called.stack if isinstance(called, Gate) else called) is module for module in modules)


_of_stacks: WeakKeyDictionary[nn.Module, Calls] = WeakKeyDictionary()
_lock = threading.Lock()


def calls_of(stack: nn.Module) -> Calls:
    """The calls of a model, by its stack."""
    with _lock:
        patch = vars(stack).get(PATCH)
        return _of_stacks.setdefault(stack, Calls()) if patch is None else patch.calls

"""What a call knows and its arguments don't say: carried to where Python's own context variables don't reach.

A thread starts without the variables of the one that started it, and layers are computed again by gradient
checkpointing in whatever thread runs the backward pass, long after the call.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import thread as pool
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import nn

from slimformer.changes.ledger import Ledger

Value = TypeVar("Value")
_variables: list[ContextVar[Any]] = []
_CHECKPOINT = "_gradient_checkpointing_func"


def call_variable(name: str, default: Value) -> ContextVar[Value]:
    """A context variable that is carried."""
    found = ContextVar(f"slimformer_{name}", default=default)
    _variables.append(found)
    return found


def carrying(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with the variables as they are now, wherever and whenever it is called.

    Example:
        >>> number = call_variable("number", 0)
        >>> token = number.set(3)
        >>> get = carrying(number.get)
        >>> number.reset(token)
        >>> get(), number.get()
        (3, 0)
    """
    return partial(_with_values, [(variable, variable.get()) for variable in _variables], function)


def _with_values(
    values: list[tuple[ContextVar[Any], Any]], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    before = [(variable, variable.set(value)) for variable, value in values]
    try:
        return function(*args, **kwargs)
    finally:
        for variable, token in before:
            variable.reset(token)


@dataclass
class CarriedCheckpoint:
    """Stands in for a module's function for gradient checkpointing, and carries the variables into recomputation.

    Attributes:
        had: The module's own.
    """

    had: Callable[..., Any]

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """As the module's own."""
        return self.had(carrying(function), *args, **kwargs)


def carry_into_recomputation(model: nn.Module, ledger: Ledger) -> None:
    """Let gradient checkpointing, where it is on, compute layers again with the variables of the call."""
    for module in model.modules():
        had = vars(module).get(_CHECKPOINT)
        if had is not None and not isinstance(had, CarriedCheckpoint):
            ledger.set(module, _CHECKPOINT, CarriedCheckpoint(had))


class _IntoThreads:
    """While it is open, threads and tasks of thread pools begin with the variables of where they are started."""

    def __init__(self) -> None:
        self.lock, self.open, self.ledger = threading.Lock(), 0, Ledger()

    def __enter__(self) -> None:
        with self.lock:
            self.open += 1
            if self.open == 1:
                self.ledger.set(threading.Thread, "start", _starting(threading.Thread.start))
                self.ledger.set(ThreadPoolExecutor, "submit", _submitting(ThreadPoolExecutor.submit))

    def __exit__(self, *raised: Any) -> None:
        with self.lock:
            self.open -= 1
            if self.open == 0:
                self.ledger.undo()


def _starting(had: Callable[..., None]) -> Callable[..., None]:
    def start(thread: Any) -> None:
        # A pool's own thread lives on for the tasks of others.
        if getattr(thread, "_target", None) is not getattr(pool, "_worker", None):
            thread.run = carrying(thread.run)
        had(thread)

    return start


def _submitting(had: Callable[..., Any]) -> Callable[..., Any]:
    def submit(executor: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return had(executor, carrying(function), *args, **kwargs)

    return submit


_into_threads = _IntoThreads()


@contextlib.contextmanager
def setting(variable: ContextVar[Value], value: Value) -> Iterator[None]:
    """A block in which a variable has a value, also in threads that it starts."""
    token = variable.set(value)
    try:
        with _into_threads:
            yield
    finally:
        variable.reset(token)

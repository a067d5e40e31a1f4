"""What the modules inside a layer return in one call: noted, held as it was, or changed, by hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.model.layer_parts import SEVERAL, first_of


@dataclass
class Record:
    """What a module returned, and how often it was called."""

    output: Any
    calls: int = 1

    @property
    def vectors(self) -> Tensor | None:
        """The first of what it returned, where that is a tensor."""
        first: Any = first_of(self.output)
        return first if isinstance(first, Tensor) else None


@dataclass(frozen=True)
class Recorder:
    """A forward hook that notes what the module at a path returns."""

    path: str
    records: dict[str, Record]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the first result, and count."""
        known = self.records.get(self.path)
        if known is not None:
            known.calls += 1
        else:
            # Layers behind may write into it.
            self.records[self.path] = Record(_copied(output))


@dataclass(frozen=True)
class Changer:
    """A forward hook that changes what a module returns."""

    change: Callable[[Any], Any]

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """What stands for the result."""
        return self.change(output)


@dataclass(frozen=True)
class Held:
    """A change: the result of another call, whatever the module computes in this one."""

    output: Any

    def __call__(self, output: Any) -> Any:
        """A copy, since layers behind may write into it."""
        return _copied(self.output)


def _copied(value: Any) -> Any:
    if type(value) in SEVERAL:
        return type(value)(_copied(part) for part in value)
    return value.clone() if isinstance(value, Tensor) else value


def perturbed(value: Any) -> Any:
    """What layers share, such as keys, with other numbers; anything else as it is."""
    if not isinstance(value, MutableMapping):
        return value
    made = copy.copy(value)
    made.update({key: _flipped(part) for key, part in value.items()})
    return made


def _flipped(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_flipped(part) for part in value)
    return value.flip(-1) if isinstance(value, Tensor) and value.is_floating_point() else value


def zeroed(output: Any) -> Any:
    """A change: zeros for what a module returns first."""
    if isinstance(output, SEVERAL):
        return type(output)([torch.zeros_like(output[0]), *output[1:]])
    return torch.zeros_like(output)

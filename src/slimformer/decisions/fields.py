"""What the fields of methods may hold: a plan may come from anyone, so each is checked before anything is applied."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from slimformer.errors import PlanError

# What a layer, a length or a distance may be at most: what every index of torch holds.
MOST = 2**31 - 1
_LAYER = re.compile("[0-9]{1,9}")


def as_tuple(owner: str, name: str, given: Any) -> tuple[Any, ...]:
    """The entries of a list.

    Raises:
        PlanError: If it is none.
    """
    if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
        raise PlanError(f"{owner}({name}=...) takes a list, got {given!r}.")
    return tuple(given)


def is_whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number from `least` up, and no larger than `MOST`."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MOST


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def layer_number(name: Any) -> Any:
    """A layer as JSON writes it, whose keys are text, as a number; anything else as it is."""
    return int(name) if isinstance(name, str) and _LAYER.fullmatch(name) else name


def checked_flag(owner: str, name: str, value: Any) -> None:
    """Refuse what is neither True nor False: text such as "false" would count as true.

    Raises:
        PlanError: If it is something else.
    """
    if not isinstance(value, bool):
        raise PlanError(f"{owner}({name}=...) takes True or False, got {value!r}.")


def checked_weights(owner: str, weights: Any) -> None:
    """Refuse learned weights that nothing can be computed with.

    Raises:
        PlanError: If they are no tensors of floating-point numbers by name, or one is NaN or infinite.

    Example:
        >>> checked_weights("EarlyExit", {"head.bias": torch.tensor([0.0, float("nan")])})
        Traceback (most recent call last):
        slimformer.errors.PlanError: EarlyExit(weights=...): head.bias holds NaN or infinite numbers. Fit it again.
    """
    if not isinstance(weights, Mapping):
        raise PlanError(f"{owner}(weights=...) takes tensors by name, got {type(weights).__name__}.")
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise PlanError(
                f"{owner}(weights=...) takes tensors of floating-point numbers by name; {name} is {kind}."
            )
        if not tensor.is_meta and not bool(torch.isfinite(tensor.detach()).all()):
            raise PlanError(f"{owner}(weights=...): {name} holds NaN or infinite numbers. Fit it again.")


def checked_width(what: str, width: int, hidden: int, model: str) -> None:
    """Refuse what was learned for a residual of another width.

    Args:
        what: What it is, and of which layer.
        width: What it was learned for.
        hidden: What the model has.
        model: Its name.

    Raises:
        PlanError: If the two differ.
    """
    if width != hidden:
        raise PlanError(
            f"{what} is for a hidden size of {width}, and {model} has {hidden}. Make a plan for this model."
        )

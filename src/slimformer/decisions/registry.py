"""Methods by name: what a plan saves of each, and what it is read back into."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from torch import Tensor

from slimformer.errors import PlanError

Class = TypeVar("Class", bound=type[Any])
_METHODS: dict[str, type[Any]] = {}
_WEIGHTS = "weights"
# Makes a plan of what names or holds one; plans lie above methods, of which some hold a plan.
_READERS: list[Callable[[Any, Mapping[str, Tensor]], Any]] = []


def register(name: str) -> Callable[[Class], Class]:
    """A decorator that gives a method the name under which plans save it and find it again.

    The class is a dataclass with `decisions` (a token policy) or `transform_attention` (an attention transform). Its
    fields go into the plan's JSON, where tuples are read back as lists and keys as text; a field `weights`, tensors by
    name, goes into the safetensors file. A class whose fields JSON cannot hold says otherwise in `settings()` and
    `tensors()`. Reading a plan imports nothing: the class must be defined by then. Plans may come from anyone, so
    check the fields in `__post_init__`.

    Args:
        name: Such as `"my-policy"`; saved in plans, so never change it.

    Raises:
        PlanError: If the name is another class's, or the class is no dataclass or no method.

    Example:
        >>> from dataclasses import dataclass
        >>> from slimformer.decisions.policy import Decision
        >>> @register("doctest-without-mlp")
        ... @dataclass(frozen=True)
        ... class WithoutMlp:
        ...     layer: int
        ...     def decisions(self, anatomy):
        ...         return {(self.layer, "mlp"): Decision(compute=False)}
        >>> settings_of(WithoutMlp(3))
        {'layer': 3}
    """
    if not isinstance(name, str) or not name:
        raise PlanError(
            f'register takes the name that plans save, as in @slimformer.register("my-policy"), got {name!r}.'
        )

    def registering(method: Class) -> Class:
        if not isinstance(method, type) or not dataclasses.is_dataclass(method):
            raise PlanError(
                f"@register({name!r}) takes a dataclass, whose fields a plan can save, got {method!r}. Write "
                "@dataclass below it."
            )
        if not any(callable(getattr(method, part, None)) for part in ("decisions", "transform_attention")):
            raise PlanError(
                f"{method.__name__} is no method: it needs decisions(self, anatomy), or transform_attention(self, "
                "attentions)."
            )
        known = _METHODS.get(name)
        # The same class again, as when a notebook's cell is run twice.
        again = known is not None and _place(known) == _place(method)
        if known is not None and not again:
            raise PlanError(
                f"The name {name!r} is that of {known.__module__}.{known.__qualname__}. Register {method.__name__} "
                "under another one."
            )
        _METHODS[name] = method
        return method

    return registering


def registered() -> Mapping[str, type[Any]]:
    """Every method by its name, in the order of their registration."""
    return MappingProxyType(_METHODS)


def name_of(method: object) -> str | None:
    """The name that a plan saves a method under; None if its class is not registered."""
    return next((name for name, known in _METHODS.items() if type(method) is known), None)


def settings_of(method: Any) -> dict[str, Any]:
    """What a plan's JSON says of a method: its `settings()`, or its fields.

    Raises:
        PlanError: If a field is nothing that JSON can hold.
    """
    if hasattr(method, "settings"):
        return method.settings()
    settings = {f.name: getattr(method, f.name) for f in _fields(type(method)) if f.name != _WEIGHTS}
    for name, value in settings.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise PlanError(
                f"{type(method).__name__}({name}=...) cannot be saved in a plan: {error}. Make it of numbers, text, "
                "lists and dicts, or say in settings() what is saved."
            ) from error
    return settings


def tensors_of(method: Any) -> dict[str, Tensor]:
    """What a plan saves of a method beside its JSON: its `tensors()`, or its field `weights`."""
    return method.tensors() if hasattr(method, "tensors") else dict(getattr(method, _WEIGHTS, {}))


def field_names(method: type[Any]) -> tuple[str, ...]:
    """What JSON may set in a method."""
    return tuple(f.name for f in _fields(method) if f.name != _WEIGHTS)


def made(method: type[Any], settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Any:
    """A method of what a plan saved; weights go to a class that has a field for them."""
    has = any(f.name == _WEIGHTS for f in _fields(method))
    return method(**settings, **({_WEIGHTS: weights} if has else {}))


def reads_plans(reader: Callable[[Any, Mapping[str, Tensor]], Any]) -> Callable[..., Any]:
    """A decorator for what `plan_of` asks."""
    _READERS[:] = [reader]
    return reader


def plan_of(given: Any, weights: Mapping[str, Tensor]) -> Any:
    """The plan in a method that holds one: a method, a plan, where one is, or the JSON and the weights of one.

    Raises:
        PlanError: If it cannot be read.
    """
    return _READERS[0](given, weights)


def _fields(method: type[Any]) -> list[dataclasses.Field[Any]]:
    return [f for f in dataclasses.fields(method) if f.init]


def _place(method: type[Any]) -> tuple[str, str]:
    return method.__module__, method.__qualname__

"""`--set NAME=VALUE`: what a command passes on by name, checked against the types of those that take it."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

import typer


class Settings:
    """The settings that were typed, taken out by those that know them.

    Args:
        given: Entries such as `"seed=3"`.

    Raises:
        typer.BadParameter: If one has no name, or a name comes twice.
    """

    def __init__(self, given: Sequence[str] | None) -> None:
        self.left: dict[str, str] = {}
        self.known: list[str] = []
        for entry in given or ():
            name, mark, value = entry.partition("=")
            name = name.strip().replace("-", "_")
            if not mark or not name or name in self.left:
                raise typer.BadParameter(f"--set takes NAME=VALUE, each name once; got {entry!r}.")
            self.left[name] = value.strip()

    def take(self, owner: Callable[..., Any], names: Iterable[str]) -> dict[str, Any]:
        """The values of some parameters or fields, of the types that their owner says.

        Raises:
            typer.BadParameter: If a value is of another type.
        """
        hints, found = typing.get_type_hints(owner), {}
        for name in names:
            self.known.append(name)
            if name not in self.left:
                continue
            text = self.left.pop(name)
            values = [value for value in _readings(text) if _fits(value, hints[name])]
            if not values:
                raise typer.BadParameter(f"--set {name}=... takes {_said(hints[name])}, got {text!r}.")
            found[name] = values[0]
        return found

    def check_none_left(self, what: str) -> None:
        """Refuse the names that nobody took.

        Raises:
            typer.BadParameter: If there are any; lists those that would do.
        """
        if self.left:
            known = ", ".join(dict.fromkeys(self.known))
            raise typer.BadParameter(
                f"--set {', '.join(self.left)} does not apply to {what}. What does: {known}."
            )


def _readings(text: str) -> list[Any]:
    """What a value may mean, the likeliest first: JSON, text, a list of either."""
    parts = [_json(part.strip()) for part in text.split(",")]
    return [_json(text), text, parts]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in inside)
    if origin is Literal:
        return value in inside
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return isinstance(value, dict) and all(_fits(entry, inside[1]) for entry in value.values())
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return isinstance(value, list) and all(_fits(entry, inside[0]) for entry in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint in (bool, int, str):
        return type(value) is hint
    return hint is type(None) and value is None


def _said(hint: Any) -> str:
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(said for part in inside if (said := _said(part))))
    if origin is Literal:
        return ", ".join(map(str, inside))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "a JSON object"
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list, such as a,b, of {_said(inside[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint, "")

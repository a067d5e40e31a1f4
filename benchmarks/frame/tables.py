"""Markdown tables made from result files, and the places in documents where they stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.frame import results
from benchmarks.frame.registry import TABLES, Table

# What is shown of a measurement; of none where there is none.
Cell = Callable[[Any], str]
_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def updated(text: str, folder: Path) -> str:
    """The document with every table between its markers made anew from the result files.

    Raises:
        KeyError: If a marker names a table that does not exist.
    """

    def place(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        if name not in TABLES:
            raise KeyError(f"no table is named {name}; there are {', '.join(TABLES)}")
        path = folder / f"{TABLES[name].source}.json"
        found = render(TABLES[name], results.read(path)) if path.exists() else ""
        found = found or f"*Not measured yet: `python -m benchmarks run {TABLES[name].source}`.*"
        return f"{opening}{found}\n{closing}"

    return _PLACE.sub(place, text)


def render(table: Table, content: dict[str, Any]) -> str:
    """One table under a line that says on what it was measured; nothing where the table has no row."""
    versions = content["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers"))
    origin = f"{content['device']}, {packages}, {content['date']}"
    if content["smoke"]:
        origin += ", smoke sizes: no time means anything"
    if not content["complete"]:
        origin += ", stopped early"
    rendered = table.render(content)
    return f"{rendered}\n\n*{origin}.*" if rendered else ""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; its first column is text, the others are right-aligned."""
    lines = [_row(head), _row([":--", *["--:"] * (len(head) - 1)])]
    return "\n".join([*lines, *map(_row, rows)])


def find(content: dict[str, Any], candidate: str, **parameters: object) -> dict[str, Any] | None:
    """The measurement of a candidate at a point, or None where there is none or it failed."""
    for measurement in content["measurements"]:
        given = measurement["parameters"]
        same = all(given.get(name) == value for name, value in parameters.items())
        if measurement["candidate"] == candidate and same and measurement["status"] == "ok":
            return dict(measurement)
    return None


def points(
    content: dict[str, Any], *names: str, where: Callable[[dict[str, Any]], bool] = lambda at: True
) -> list[dict[str, Any]]:
    """The distinct points by some parameters, in the order they were measured; None where there is no such one."""
    found = {
        tuple(m["parameters"].get(name) for name in names): None
        for m in content["measurements"]
        if where(m["parameters"])
    }
    return [dict(zip(names, values, strict=True)) for values in found]


def distinct(
    content: dict[str, Any], name: str, where: Callable[[dict[str, Any]], bool] = lambda at: True
) -> list[Any]:
    """The distinct values of one parameter."""
    return [at[name] for at in points(content, name, where=where)]


def candidates(content: dict[str, Any]) -> list[str]:
    """Everything that was measured, each once."""
    return list(dict.fromkeys(measurement["candidate"] for measurement in content["measurements"]))


def by_measurement(content: dict[str, Any], columns: Mapping[str, Cell]) -> str:
    """One row for every measurement that did not fail."""
    measured = [found for found in content["measurements"] if found["status"] == "ok"]
    return markdown(list(columns), [[cell(found) for cell in columns.values()] for found in measured])


def grid(
    content: dict[str, Any],
    first: str,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    columns: Sequence[tuple[str, Mapping[str, Any], Cell]],
) -> str:
    """A table whose rows and columns both say which measurement a cell shows.

    Args:
        content: Of a result file.
        first: The head of the labels.
        rows: Each a label, and parameters or the candidate.
        columns: Each a head, the other parameters or the candidate, and what is shown of the measurement.
    """
    cells = [[label, *(cell(find(content, **row, **at)) for _, at, cell in columns)] for label, row in rows]
    return markdown([first, *(head for head, _, _ in columns)], cells)


def candidate(measurement: dict[str, Any]) -> str:
    """Who was measured."""
    return str(measurement["candidate"])


def value(name: str, form: str = ".2f", unit: str = "") -> Cell:
    """Shows one of the values, a dash where there is none."""
    return lambda measurement: shown(figure(measurement, name), form, unit)


def shown(value: float | None, form: str = ".2f", unit: str = "") -> str:
    """A figure in a format and with its unit; a dash where there is none."""
    return "–" if value is None else f"{value:{form}}{unit}"


def milliseconds(measurement: dict[str, Any] | None) -> str:
    """Its median, with three digits."""
    if measurement is None or measurement["milliseconds"] is None:
        return "–"
    return number(measurement["milliseconds"]["p50"])


def ratio(measurement: dict[str, Any] | None, name: str) -> str:
    """One of its ratios, with two decimals."""
    return shown(None if measurement is None else measurement[name])


def gain(measurement: dict[str, Any] | None, form: str = ".2f") -> str:
    """How many times faster than the baseline."""
    return "–" if measurement is None else f"{1 / measurement['baseline_ratio']:{form}}×"


def figure(measurement: dict[str, Any] | None, name: str) -> float | None:
    """One of its values."""
    return None if measurement is None else measurement["values"].get(name)


def change(value: float, dense: float) -> str:
    """By how many percent a figure is off the dense model's."""
    return f"{100 * (value / dense - 1):+.1f}%" if dense else "–"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def best_in_bold(
    values: Sequence[float | None], digits: int, best: Callable[[Iterable[float]], float]
) -> list[str]:
    """Cells of one row, the best bold; figures that look alike are equally good, and where all do, none is bold.

    Example:
        >>> best_in_bold([81.643, 81.65, None, 80.5], 1, max)
        ['**81.6**', '**81.6**', '–', '80.5']
        >>> best_in_bold([0.0, 0.0], 1, max)
        ['0.0', '0.0']
    """
    texts = [None if value is None else f"{value:.{digits}f}" for value in values]
    known = [value for value in values if value is not None]
    winner = f"{best(known):.{digits}f}" if len(set(texts) - {None}) > 1 else None
    return ["–" if text is None else f"**{text}**" if text == winner else text for text in texts]

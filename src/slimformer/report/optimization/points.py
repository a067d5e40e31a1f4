"""The candidates that a plan says were judged, checked: its file may come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slimformer.plans.plan import Plan

GOALS = {"prefill": "prefill", "generate": "generation", "encode": "embedding", "memory": "memory"}


@dataclass(frozen=True)
class Point:
    """One candidate.

    Attributes:
        what: What it leaves out, in words.
        speedup: How many times as fast as dense, or as small.
        lost: Of every capability, the part lost.
        mean: The mean of these.
        repaired: Whether it was repaired.
        front: Whether no other is faster at no more loss.
        chosen: Whether the plan has it.
    """

    what: str
    speedup: float
    lost: Mapping[str, float]
    mean: float
    repaired: bool
    front: bool
    chosen: bool


def found_in(plan: Plan) -> Mapping[str, Any]:
    """What a plan holds of an optimisation; empty where it holds none."""
    found = plan.measured.get("optimize")
    return found if isinstance(found, Mapping) else {}


def points_of(found: Mapping[str, Any]) -> list[Point]:
    """The candidates, the slowest first."""
    entries = found.get("candidates")
    points = [
        _point(entry)
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, Mapping)
    ]
    return sorted((point for point in points if point is not None), key=lambda point: point.speedup)


def shown_points(points: list[Point], found: Mapping[str, Any]) -> list[Point]:
    """Those for a picture: what loses far more than was asked for would press everything else together."""
    most = max(8 * _number(found.get("max_loss")), 0.3)
    return [point for point in points if point.mean <= most or point.chosen]


def asked(found: Mapping[str, Any]) -> str:
    """What was asked for, in words.

    Example:
        >>> asked({"goal": "prefill", "max_loss": 0.02, "prompt": 8192, "batch": 1})
        'prefill of 8192 tokens, batch 1, losing at most 2% on average and 4% of each'
    """
    goal = str(found.get("goal", ""))
    words = GOALS.get(goal, goal)
    if goal != "encode":
        words += f" of {_number(found.get('prompt')):.0f} tokens"
    if goal == "generate":
        words += f" and {_number(found.get('new_tokens')):.0f} behind them"
    words += f", batch {_number(found.get('batch')):.0f}"
    if isinstance(found.get("max_loss"), (int, float)):
        loss = 100 * _number(found["max_loss"])
        verdict = found.get("verdict")
        yours = isinstance(verdict, Mapping) and verdict.get("yours") is True
        bound = " of your own task" if yours else f" on average and {2 * loss:g}% of each"
        return f"{words}, losing at most {loss:g}%{bound}" if loss else f"{words}, losing nothing"
    return f"{words}, at {_number(found.get('speedup')):g} times dense"


def chosen_words(found: Mapping[str, Any]) -> str:
    """What was chosen, in one sentence; empty where nothing was.

    Example:
        >>> tried = {"what": "MLPs 3", "speedup": 1.1, "lost": {"text": 0.01}, "mean_lost": 0.01, "chosen": True}
        >>> chosen_words({"goal": "prefill", "candidates": [tried]})
        'MLPs 3: 1.10 times as fast as dense, with 99.0% kept on average, and least of text, 99.0%'
    """
    chosen = next((point for point in points_of(found) if point.chosen), None)
    if chosen is None:
        return ""
    as_much = "small" if found.get("goal") == "memory" else "fast"
    what = "slimformer.patch(model) alone" if chosen.what == "nothing dropped" else chosen.what
    words = f"{what}{', repaired' * chosen.repaired}: {chosen.speedup:.2f} times as {as_much} as dense"
    if not any(chosen.lost.values()):
        return f"{words}, and nothing is lost"
    worst = max(chosen.lost, key=lambda name: chosen.lost[name])
    return (
        f"{words}, with {100 * (1 - chosen.mean):.1f}% kept on average, and least of {worst}, "
        f"{100 * (1 - chosen.lost[worst]):.1f}%"
    )


def capabilities_of(points: list[Point]) -> list[str]:
    """The names of all that was measured."""
    return list(dict.fromkeys(name for point in points for name in point.lost))


def notes_of(found: Mapping[str, Any]) -> list[str]:
    """What is to be known of the search."""
    notes = found.get("notes")
    said = [str(note) for note in notes] if isinstance(notes, list) else []
    why = found.get("why")
    return [f"Nothing was chosen: {why}", *said] if found.get("won") is False else said


def _point(entry: Mapping[str, Any]) -> Point | None:
    lost = entry.get("lost")
    numbers = (entry.get("speedup"), entry.get("mean_lost"))
    if not isinstance(lost, Mapping) or not all(map(_finite, (*numbers, *lost.values()))):
        return None
    return Point(
        str(entry.get("what", "")),
        _number(numbers[0]),
        {str(name): _number(value) for name, value in lost.items()},
        _number(numbers[1]),
        entry.get("repaired") is True,
        entry.get("front") is True,
        entry.get("chosen") is True,
    )


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: Any) -> float:
    return float(value) if _finite(value) else 0.0

"""What repair won back, as a table for a terminal and a chart for the plan's page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from slimformer.plans.plan import Plan
from slimformer.report.charts import round_ticks, svg, svg_text
from slimformer.report.tables import caption

_LEFT, _TOP, _WIDTH, _HEIGHT = 84.0, 26.0, 640.0, 260.0
_AXIS = "divergence from dense on held-out text"


def nothing_won(plan: Plan) -> str:
    """Why the last repair won nothing; empty where it won something, or there was none.

    Example:
        >>> from slimformer import LayerDrop
        >>> said = {"repair": {"won": False, "why": "no step was better than none"}}
        >>> nothing_won(Plan([LayerDrop(attention=[1])], measured=said))
        'no step was better than none'
    """
    found = plan.measured.get("repair")
    if not isinstance(found, Mapping) or found.get("won") is not False:
        return ""
    return str(found.get("why", "no step was better than none"))


class Round(NamedTuple):
    """One round of a repair.

    Attributes:
        dropped: How many sublayers did not run in it.
        curve: Steps and the divergence after each of them, the first before any.
        best: The step that was kept.
        steps: How many steps there were.
        rate: The learning rate's peak; None where the plan does not tell.
        lowered: How many rates before were too high.
    """

    dropped: int
    curve: tuple[tuple[int, float], ...]
    best: int
    steps: int
    rate: float | None = None
    lowered: int = 0

    @property
    def before(self) -> float:
        """The divergence that it began with."""
        return self.curve[0][1]

    @property
    def after(self) -> float:
        """The divergence at the step that was kept."""
        return dict(self.curve).get(self.best, self.curve[-1][1])


def repair_table(plan: Plan) -> Table:
    """The divergence before and after every round.

    Args:
        plan: A plan that `slimformer.repair` made.

    Example:
        >>> from slimformer import LayerDrop
        >>> done = {"dropped": 2, "held_out": {"0": 0.4, "25": 0.2}, "best": 25, "losses": [0.3] * 25}
        >>> repair_table(Plan([LayerDrop(attention=[3, 5])], provenance={"repair": [done]})).row_count
        1
    """
    why = nothing_won(plan)
    table = Table(
        title=Text(f"Repair{': nothing was won' if why else ''}: {_AXIS}"),
        title_justify="left",
        caption=Text(". ".join(part for part in (why.rstrip(".") or _rates_of(plan), caption(plan)) if part)),
        caption_justify="left",
    )
    for name in ("round", "sublayers dropped", "before", "after", "won back", "steps", "best step"):
        table.add_column(name, justify="right")
    for number, found in enumerate(rounds_of(plan), start=1):
        table.add_row(
            str(number),
            str(found.dropped),
            f"{found.before:.4g}",
            f"{found.after:.4g}",
            _share(found.before, found.after),
            str(found.steps),
            str(found.best),
        )
    return table


def repair_section(plan: Plan) -> str:
    """The part of a plan's page with the curve of every round; empty if the plan was not repaired."""
    rounds = rounds_of(plan)
    if not rounds:
        return ""
    first, last, why = rounds[0].before, rounds[-1].after, nothing_won(plan)
    more = f" in {len(rounds)} rounds, each of which drops more" if len(rounds) > 1 else ""
    text = (
        f"The dense model taught its slimmed self on unlabelled text{more}. Divergence from dense on text that was not "
        f"trained on: {first:.4g} before, {last:.4g} after. The filled point of a curve is what was kept."
    )
    if why:
        text = f"Nothing was won, and the plan is what it was before: {why}"
    return (
        f'<section><h2>Repair</h2><p>{escape(text)}</p><div class="scroll">{_chart(rounds)}</div></section>'
    )


def rounds_of(plan: Plan) -> list[Round]:
    """The rounds that a plan says it was repaired in, without what is none: its file may come from anywhere."""
    found = plan.provenance.get("repair")
    rounds = []
    for entry in found if isinstance(found, list) else []:
        curve = _curve(entry.get("held_out")) if isinstance(entry, Mapping) else ()
        if curve:
            best, dropped, losses = (entry.get(name) for name in ("best", "dropped", "losses"))
            rounds.append(
                Round(
                    dropped if isinstance(dropped, int) else 0,
                    curve,
                    best if isinstance(best, int) else curve[-1][0],
                    len(losses) if isinstance(losses, list) else curve[-1][0],
                    *_rates(entry),
                )
            )
    return rounds


def _rates(entry: Mapping[str, Any]) -> tuple[float | None, int]:
    rate, failed = entry.get("learning_rate"), entry.get("failed")
    known = float(rate) if isinstance(rate, (int, float)) and math.isfinite(rate) else None
    return known, (len(failed) if isinstance(failed, list) else 0)


def _rates_of(plan: Plan) -> str:
    """The learning rate of every round, with how often it was lowered."""
    said = [
        f"{found.rate:.3g}{f' (lowered {found.lowered} times)' if found.lowered else ''}"
        for found in rounds_of(plan)
        if found.rate is not None
    ]
    return f"learning rate {', '.join(said)}" if said else ""


def _curve(given: Any) -> tuple[tuple[int, float], ...]:
    if not isinstance(given, Mapping):
        return ()
    points = [
        (int(step), float(value))
        for step, value in given.items()
        if str(step).isdigit() and isinstance(value, (int, float)) and math.isfinite(value)
    ]
    return tuple(sorted(points))


def _chart(rounds: list[Round]) -> str:
    ticks = round_ticks(max(value for found in rounds for _, value in found.curve))
    total = sum(max(found.curve[-1][0], 1) for found in rounds)
    bottom = _TOP + _HEIGHT
    parts = [svg_text(_LEFT - 8, 11, _AXIS, "start", "axis")]
    for tick in ticks:
        y = bottom - _HEIGHT * tick / ticks[-1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(_LEFT - 8, y + 4, f"{tick:g}", "end"))
    start = 0
    for number, found in enumerate(rounds, start=1):
        places = [
            (_LEFT + _WIDTH * (start + step) / total, bottom - _HEIGHT * max(value, 0.0) / ticks[-1])
            for step, value in found.curve
        ]
        parts.append(f'<path class="line total" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
        for (x, y), (step, value) in zip(places, found.curve, strict=True):
            kept = step == found.best
            label = f"round {number}, step {step}: {value:.4g}{', kept' if kept else ''}"
            style, size = ("dot total", 6) if kept else ("ring total", 3)
            parts.append(
                f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{size}"><title>{escape(label)}</title></circle>'
            )
        if found.dropped:
            parts.append(svg_text(places[0][0] + 6, bottom - 8, f"{found.dropped} dropped", "start", "label"))
        parts.append(svg_text(places[0][0], bottom + 18, str(start), "middle"))
        start += max(found.curve[-1][0], 1)
    parts.append(svg_text(_LEFT + _WIDTH, bottom + 18, str(start), "middle"))
    parts.append(svg_text(_LEFT + _WIDTH / 2, bottom + 38, "steps", "middle", "axis"))
    return svg(_LEFT + _WIDTH + 24, bottom + 48, f"{_AXIS} against steps", parts)


def _share(before: float, after: float) -> str:
    return f"{100 * (before - after) / before:.0f}%" if before > 0 else ""

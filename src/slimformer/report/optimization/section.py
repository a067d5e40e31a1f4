"""The part of a plan's page with what was tried: speed against what is kept, the front, and how to use the plan."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from slimformer.plans.plan import Plan
from slimformer.report.charts import round_ticks, svg, svg_text, ticks_around
from slimformer.report.optimization.points import (
    Point,
    asked,
    capabilities_of,
    chosen_words,
    found_in,
    notes_of,
    points_of,
    shown_points,
)
from slimformer.report.optimization.using import uses_of

_LEFT, _TOP, _WIDTH, _HEIGHT = 64.0, 26.0, 720.0, 300.0


def optimize_section(plan: Plan) -> str:
    """Empty where the plan carries no candidates."""
    found = found_in(plan)
    points = points_of(found)
    if not points:
        return ""
    text = (
        "Every point is a plan that was tried: how fast it is beside dense, and what it keeps of the dense model's "
        "capabilities on average; the thin line below a point reaches to the capability of which least is kept. No "
        "plan is faster at no more loss than those on the line. The large filled point is what was chosen, rings were "
        "repaired, and the dashed line is what was asked for."
    )
    chosen = chosen_words(found)
    said = [f"Asked for: {asked(found)}", *([f"Chosen: {chosen}"] if chosen else []), *notes_of(found), text]
    paragraphs = "".join(f"<p>{escape(part.rstrip('.'))}.</p>" for part in said)
    return (
        f"<section><h2>What was tried, and what was chosen</h2>{paragraphs}"
        f'<div class="scroll">{_picture(points, found)}</div>'
        f'<div class="long">{_table(points)}</div></section>'
        f"<section><h2>What to do with it</h2>{_uses(plan, found)}</section>"
    )


def _picture(points: list[Point], found: Mapping[str, Any]) -> str:
    bottom = _TOP + _HEIGHT
    shown = shown_points(points, found)
    ticks = round_ticks(max(0.02, *(p.mean for p in shown)))
    speeds = [1.0, *(p.speedup for p in shown)]
    along = ticks_around(min(speeds), max(max(speeds), min(speeds) + 0.1), 7)
    low, high = along[0], along[-1]

    def place(speed: float, lost: float) -> tuple[float, float]:
        x = _LEFT + _WIDTH * (speed - low) / (high - low)
        return x, _TOP + _HEIGHT * min(max(lost, 0.0) / ticks[-1], 1.0)

    parts = [svg_text(_LEFT - 8, 11, "kept of dense, on average", "start", "axis")]
    for tick in ticks:
        _, y = place(low, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(_LEFT - 8, y + 4, f"{100 * (1 - tick):.3g}%", "end"))
    for speed in along:
        parts.append(svg_text(place(speed, 0)[0], bottom + 18, f"{speed:g}×", "middle"))
    if isinstance(found.get("max_loss"), (int, float)) and 0 < found["max_loss"] <= ticks[-1]:
        (left, y), (right, _) = place(low, found["max_loss"]), place(high, 0)
        parts.append(_dashed(left, y, right, y))
    elif isinstance(found.get("speedup"), (int, float)) and low <= found["speedup"] <= high:
        x, _ = place(found["speedup"], 0)
        parts.append(_dashed(x, _TOP, x, bottom))
    goal = "size of dense over its own" if found.get("goal") == "memory" else "speed, dense is 1"
    parts.append(svg_text(_LEFT + _WIDTH / 2, bottom + 38, goal, "middle", "axis"))
    for repaired in (False, True):
        line = [place(p.speedup, p.mean) for p in shown if p.front and p.repaired == repaired]
        if len(line) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in line)
            parts.append(f'<path class="line {"mlp" if repaired else "total"}" d="M{path}"/>')
    for point in shown:
        x, y = place(point.speedup, point.mean)
        _, worst = place(point.speedup, max(point.lost.values(), default=point.mean))
        kind = "mlp" if point.repaired else "total"
        style = f"{'dot' if point.chosen or not point.repaired else 'ring'} {kind}"
        label = f"{point.what}: {point.speedup:.2f}×, {100 * (1 - point.mean):.1f}% kept"
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{y:.1f}" y2="{worst:.1f}"/>')
        parts.append(
            f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{8 if point.chosen else 4}">'
            f"<title>{escape(label)}</title></circle>"
        )
    return svg(
        _LEFT + _WIDTH + 24, bottom + 48, "Speed of every plan that was tried against what it keeps", parts
    )


def _dashed(x1: float, y1: float, x2: float, y2: float) -> str:
    return (
        f'<line class="grid" style="stroke: var(--muted); stroke-dasharray: 6 4" '
        f'x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'
    )


def _table(points: list[Point]) -> str:
    names = capabilities_of(points)
    head = "".join(
        f"<th{' class=number' * (number > 1)}>{escape(name)}</th>"
        for number, name in enumerate(("", "Leaves out", "Speed", "Kept", *names))
    )
    rows = []
    # The one that is looked for first, then all from the slowest to the fastest.
    for point in sorted(points, key=lambda point: not point.chosen):
        mark = "chosen" if point.chosen else "front" if point.front else ""
        kept = (point.mean, *(point.lost.get(name, 0.0) for name in names))
        numbers = "".join(f'<td class="number">{100 * (1 - value):.1f}%</td>' for value in kept)
        words = escape(point.what + ", repaired" * point.repaired)
        rows.append(
            f'<tr><td>{mark}</td><td>{words}</td><td class="number">{point.speedup:.2f}×</td>{numbers}</tr>'
        )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _uses(plan: Plan, found: Mapping[str, Any]) -> str:
    if found.get("won") is False:
        return "<p>Nothing: this plan changes nothing. Allow more loss, or give more minutes.</p>"
    rows = "".join(
        f"<tr><td>{name}</td><td>{f'<code>{escape(use)}</code>' if code else escape(use)}</td></tr>"
        for name, use, code in uses_of(plan)
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'

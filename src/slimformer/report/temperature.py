"""The sweep of a temperature: a table for a terminal, and curves for a plan's page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from slimformer.plans.plan import Plan
from slimformer.report.charts import svg, svg_text
from slimformer.report.tables import caption

_LEFT, _TOP, _WIDTH, _HEIGHT = 72.0, 26.0, 480.0, 220.0
_TICKS = 5


def temperature_table(plan: Plan) -> Table | None:
    """The figure at every temperature that was tried; None if the plan carries no sweep.

    Example:
        >>> from slimformer import TempScale
        >>> sweep = {"name": "nDCG@10", "tau": [1.0, 0.9], "scores": [0.3, 0.4]}
        >>> temperature_table(Plan([TempScale(0.9)], provenance={"temperature": sweep})).row_count
        2
    """
    curve = _curve(plan)
    if curve is None:
        return None
    table = Table(
        title=Text(f"{curve['name']} by temperature"),
        title_justify="left",
        caption=Text(caption(plan)),
        caption_justify="left",
    )
    for name in ("τ", "figure", *(f"spread at {n}" for n in curve["lengths"]), ""):
        table.add_column(name, justify="right")
    chosen = _chosen(plan)
    for index, (tau, score) in enumerate(zip(curve["tau"], curve["scores"], strict=True)):
        spread = [f"{value:.3f}" for value in curve["spread"][index]] if curve["lengths"] else []
        table.add_row(f"{tau:g}", f"{score:#.4g}", *spread, "chosen" if tau == chosen else "")
    return table


def temperature_section(plan: Plan) -> str:
    """The part of a plan's page with the sweep; empty if the plan carries none."""
    curve = _curve(plan)
    if curve is None:
        return ""
    chosen = _chosen(plan)
    text = (
        f"{curve['name']} against the temperature τ that attention scores are divided by; 1 is the unpatched model, "
        "below 1 attention is sharper. The filled point is the plan's."
    )
    drawings = [_chart(curve["tau"], {"": curve["scores"]}, "temperature τ", str(curve["name"]), chosen)]
    if curve["lengths"]:
        text += (
            " To the right the spread of embeddings (1 less the mean cosine between texts) against the length that "
            "texts are cut to: where it falls, long texts grow alike."
        )
        series = {f"τ = {tau:g}": row for tau, row in zip(curve["tau"], curve["spread"], strict=True)}
        drawings.append(_chart(curve["lengths"], series, "tokens", "spread of embeddings", None))
    inside = "".join(f'<div class="scroll">{drawing}</div>' for drawing in drawings)
    return f'<section><h2>Temperature</h2><p>{escape(text)}</p><div class="pair">{inside}</div></section>'


def _chosen(plan: Plan) -> float | None:
    return next((method.tau for method in plan.methods if hasattr(method, "tau")), None)


def _curve(plan: Plan) -> dict[str, Any] | None:
    """The sweep of a plan; None where there is none, or it has another shape: a plan may come from anywhere."""
    found = plan.provenance.get("temperature")
    if not isinstance(found, Mapping):
        return None
    try:
        taus, scores = ([float(x) for x in found[name]] for name in ("tau", "scores"))
        lengths = [int(n) for n in found.get("lengths", ())]
        spread = [[float(x) for x in row] for row in found.get("spread", ())]
    except (KeyError, TypeError, ValueError):
        return None
    numbers = [*taus, *scores, *(x for row in spread for x in row)]
    fits = len(spread) == len(taus) and all(len(row) == len(lengths) for row in spread)
    if not taus or len(taus) != len(scores) or not all(map(math.isfinite, numbers)) or (lengths and not fits):
        return None
    return {
        "name": found.get("name", ""),
        "tau": taus,
        "scores": scores,
        "lengths": lengths,
        "spread": spread,
    }


def _chart(
    places: Sequence[float],
    series: Mapping[str, Sequence[float]],
    below: str,
    above: str,
    chosen: float | None,
) -> str:
    """Lines over evenly spaced places; values differ by little, so that the axis does not start at 0."""
    values = [value for row in series.values() for value in row]
    low, high = min(values), max(values)
    pad = 0.1 * (high - low) or max(abs(high), 1e-6) * 0.1
    low, high, bottom = low - pad, high + pad, _TOP + _HEIGHT
    step = _WIDTH / max(len(places) - 1, 1)

    def height(value: float) -> float:
        return bottom - _HEIGHT * (value - low) / (high - low)

    parts = [svg_text(_LEFT - 8, 11, above, "start", "axis")]
    for number in range(_TICKS):
        value = low + (high - low) * number / (_TICKS - 1)
        y = height(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(_LEFT - 8, y + 4, f"{value:#.4g}", "end"))
    for number, place in enumerate(places):
        parts.append(svg_text(_LEFT + number * step, bottom + 18, f"{place:g}", "middle"))
    parts.append(svg_text(_LEFT + _WIDTH / 2, bottom + 38, below, "middle", "axis"))
    for name, row in series.items():
        points = [(_LEFT + number * step, height(value)) for number, value in enumerate(row)]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path class="line total" d="M{path}"/>')
        if name:
            x, y = points[-1]
            parts.append(svg_text(x + 8, y + 4, name, "start", "label"))
        for (x, y), place, value in zip(points, places, row, strict=True):
            mine = place == chosen
            label = escape(f"{name + ', ' if name else ''}{place:g}: {value:#.4g}")
            parts.append(
                f'<circle class="{"dot" if mine else "ring"} total" cx="{x:.1f}" cy="{y:.1f}" '
                f'r="{6 if mine else 4}"><title>{label}</title></circle>'
            )
    return svg(_LEFT + _WIDTH + 72, bottom + 48, f"{above} against {below}", parts)

"""What was measured of a plan that eliminates tokens, as tables for a terminal and a chart for its page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from slimformer.decisions.fields import is_number, layer_number
from slimformer.plans.plan import Plan
from slimformer.report.charts import round_ticks, svg, svg_text
from slimformer.report.tables import caption

_LEFT, _TOP, _WIDTH, _HEIGHT = 84.0, 26.0, 640.0, 280.0


def predictor_table(plan: Plan) -> Table:
    """How well the predictors of a plan do on text that they were not trained on, a row per layer.

    Args:
        plan: A plan with trained predictors.

    Example:
        >>> from slimformer import TokenElimination
        >>> measured = {"loss": 0.2, "recall_all": 0.97, "recall_last": 0.8, "sizes": [40, 52]}
        >>> plan = Plan([TokenElimination({2: 0.5})], measured={"predictors": {"2": measured}})
        >>> predictor_table(plan).row_count
        1
    """
    columns = ("layer", "loss", "recall, all ask", "recall, last ask", "neurons")
    rows = (
        (
            layer,
            f"{found['loss']:.4f}",
            _share(found["recall_all"]),
            _share(found["recall_last"]),
            str(found["sizes"]),
        )
        for layer, found in sorted(_predictors(plan).items(), key=lambda entry: int(entry[0]))
    )
    return _table("Predictors on held-out text", plan, columns, rows)


def curve_table(plan: Plan) -> Table:
    """Quality against FLOPs of the settings that a calibration tried, the cheapest first.

    Args:
        plan: A plan that calibration of `TokenElimination` made.

    Example:
        >>> from slimformer import TokenElimination
        >>> point = {"layer": 2, "keep": 0.5, "flops": 0.75, "divergence": 0.01, "chosen": True}
        >>> curve_table(Plan([TokenElimination({2: 0.5})], provenance={"curve": [point]})).row_count
        1
    """
    rows = (
        (
            str(point["layer"]),
            f"{point['keep']:g}",
            _share(point["flops"]),
            f"{point['divergence']:.4f}",
            "chosen" if point.get("chosen") else "",
        )
        for point in sorted(_points(plan), key=lambda point: float(point["flops"]))
    )
    columns = ("from layer", "keep", "prefill FLOPs", "KL to dense, nats per answer token", "")
    return _table("Settings tried", plan, columns, rows)


def curve_section(plan: Plan) -> str:
    """The part of a plan's page with quality against FLOPs; empty if the plan carries no such curve."""
    points = _points(plan)
    if not points:
        return ""
    text = (
        "Every point is a layer from which on tokens leave, and the fraction that stays. A point to the right of and "
        "above another is more work for a worse answer. The filled point is the plan's."
    )
    return (
        f"<section><h2>Quality against prefill</h2><p>{escape(text)}</p>"
        f'<div class="scroll">{_curve(points)}</div></section>'
    )


def _points(plan: Plan) -> list[Mapping[str, Any]]:
    """The settings that a plan says were tried, without what is none: its file may come from anywhere."""
    found = plan.provenance.get("curve")
    names = ("layer", "keep", "flops", "divergence")
    return [
        point
        for point in (found if isinstance(found, list) else [])
        if isinstance(point, Mapping)
        and all(isinstance(point.get(n), (int, float)) and math.isfinite(point[n]) for n in names)
    ]


def _curve(points: list[Mapping[str, Any]]) -> str:
    ticks = round_ticks(max(float(point["divergence"]) for point in points))
    bottom = _TOP + _HEIGHT

    def place(point: Mapping[str, Any]) -> tuple[float, float]:
        y = bottom - _HEIGHT * max(float(point["divergence"]), 0.0) / ticks[-1]
        return _LEFT + _WIDTH * float(point["flops"]), y

    parts = [svg_text(_LEFT - 8, 11, "KL to dense, nats per answer token", "start", "axis")]
    for tick in ticks:
        y = bottom - _HEIGHT * tick / ticks[-1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(_LEFT - 8, y + 4, f"{tick:g}", "end"))
    for share in range(0, 101, 20):
        parts.append(svg_text(_LEFT + _WIDTH * share / 100, bottom + 18, f"{share}%", "middle"))
    parts.append(svg_text(_LEFT + _WIDTH / 2, bottom + 38, "FLOPs of the dense prefill", "middle", "axis"))
    for layer in sorted({int(point["layer"]) for point in points}):
        own = sorted((p for p in points if p["layer"] == layer), key=lambda p: float(p["flops"]))
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, own))
        parts.append(f'<path class="line total" d="M{path}"/>')
        x, y = place(own[0])
        parts.append(svg_text(x - 9, y + 4, f"layer {layer}", "end", "label"))
        for point in own:
            x, y = place(point)
            label = f"{point['keep']:g} from layer {layer} on: {float(point['divergence']):.4f}"
            style = "dot total" if point.get("chosen") else "ring total"
            parts.append(
                f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="{6 if point.get("chosen") else 4}">'
                f"<title>{escape(label)}</title></circle>"
            )
    return svg(_LEFT + _WIDTH + 24, bottom + 48, "KL to dense against prefill FLOPs", parts)


def _table(title: str, plan: Plan, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(
        title=Text(title), title_justify="left", caption=Text(caption(plan)), caption_justify="left"
    )
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _predictors(plan: Plan) -> dict[str, Mapping[str, Any]]:
    """What was measured of every layer's predictor; without what a plan from elsewhere has in other forms."""
    found = plan.measured.get("predictors")
    return {
        layer: of
        for layer, of in (found.items() if isinstance(found, Mapping) else ())
        if isinstance(layer_number(layer), int)
        and isinstance(of, Mapping)
        and all(is_number(of.get(name)) for name in ("loss", "recall_all", "recall_last"))
        and "sizes" in of
    }

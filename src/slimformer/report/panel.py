"""What a plan keeps of the dense model's capabilities, as a table for a terminal and bars for the plan's page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

from rich.table import Table
from rich.text import Text

from slimformer.plans.plan import Plan
from slimformer.report.charts import svg, svg_text

_LEFT, _WIDTH, _RIGHT = 150.0, 520.0, 110.0
_BAR, _STEP, _TOP = 12.0, 46.0, 34.0
# How a figure that a capability carries is called, and how it is written.
_FIGURES = {
    "divergence": ("KL to dense {:.4g} nats per token", 1),
    "same_token": ("same first choice {:.1f}%", 100),
    "loss_dense": ("nats per token {:.3g} dense", 1),
    "loss_slim": ("{:.3g} slim", 1),
    "certainty_dense": ("certain of the key {:.2f} dense", 1),
    "certainty_slim": ("{:.2f} slim", 1),
    "right_dense": ("right {:.1f}% dense", 100),
    "right_slim": ("{:.1f}% slim", 100),
    "neighbours": ("{:.1f}% of the neighbours", 100),
    "correlation": ("rank correlation {:.4f}", 1),
    "task_dense": ("{:.4g} dense", 1),
    "task_slim": ("{:.4g} slim", 1),
}


class Bar(NamedTuple):
    """One capability, or a figure of all of them.

    Attributes:
        name: What it is.
        kept: The part kept.
        spread: Its standard error.
        words: What it was computed from.
        parts: The part kept of each kind of row.
    """

    name: str
    kept: float
    spread: float
    words: str
    parts: Mapping[str, float]


def panel_table(measured: Mapping[str, Any]) -> Table:
    """The part of every capability that is kept, then their mean and the score.

    Args:
        measured: A plan's; a table without rows where it holds no panel.

    Example:
        >>> text = {"kept": 0.93, "spread": 0.01, "figures": {"divergence": 0.07}}
        >>> panel_table({"panel": {"score": 0.93, "mean": 0.93, "capabilities": {"text": text}}}).row_count
        3
    """
    panel = _mapping(measured.get("panel"))
    table = Table(
        title=Text("capabilities: the part of dense's that is kept"),
        title_justify="left",
        caption=Text(_caption(panel)),
        caption_justify="left",
    )
    table.add_column("")
    for name in ("dense", "slim", "±"):
        table.add_column(name, justify="right")
    table.add_column("measured by")
    for bar in bars_of(panel):
        row = (bar.name, "100%", f"{100 * bar.kept:.1f}%", f"{100 * bar.spread:.1f}", bar.words)
        table.add_row(*map(Text, row))
    for bar in _together(panel):
        spread = f"{100 * bar.spread:.1f}" if math.isfinite(bar.spread) else ""
        table.add_row(*map(Text, (bar.name, "100%", f"{100 * bar.kept:.1f}%", spread, bar.words)))
    return table


def panel_section(plan: Plan) -> str:
    """The part of a plan's page with a bar for every capability; empty where no panel was measured."""
    panel = _mapping(plan.measured.get("panel"))
    bars = bars_of(panel)
    if not bars:
        return ""
    text = (
        "The part of each of the dense model's capabilities that the plan keeps; the line at a bar's end is two "
        f"standard errors to either side. {_caption(panel)}"
    )
    together = "".join(
        f'<div class="tile"><b>{100 * bar.kept:.1f}%</b><span>{escape(bar.name)}</span></div>'
        for bar in _together(panel)
    )
    kinds = "".join(
        f"<tr><td>{escape(bar.name)}</td><td>{escape(kind)}</td>"
        f'<td class="number">{100 * kept:.1f}%</td></tr>'
        for bar in bars
        for kind, kept in bar.parts.items()
    )
    values = (
        f'<details><summary>By kind</summary><div class="long"><table>{kinds}</table></div></details>'
        if kinds
        else ""
    )
    return (
        f"<section><h2>Capabilities, beside the dense model</h2><p>{escape(text)}</p>"
        f'<div class="tiles">{together}</div><div class="scroll">{_chart(bars)}</div>{values}</section>'
    )


def bars_of(panel: Mapping[str, Any]) -> list[Bar]:
    """The capabilities of a stored panel, without what is none: a plan's file may come from anywhere."""
    bars = []
    for name, entry in _mapping(panel.get("capabilities")).items():
        kept, spread = (_number(_mapping(entry).get(key)) for key in ("kept", "spread"))
        if kept is None:
            continue
        figures = _mapping(_mapping(entry).get("figures"))
        words = [
            form.format(times * value)
            for key, (form, times) in _FIGURES.items()
            if (value := _number(figures.get(key))) is not None
        ]
        parts = {
            str(kind): value
            for kind, part in _mapping(_mapping(entry).get("parts")).items()
            if (value := _number(part)) is not None
        }
        bars.append(Bar(str(name), min(max(kept, 0.0), 1.0), spread or 0.0, ", ".join(words), parts))
    return bars


def _together(panel: Mapping[str, Any]) -> list[Bar]:
    """Mean and score."""
    found = []
    for name, key, spread in (("mean", "mean", None), ("score: mean and worst", "score", "spread")):
        value, error = _number(panel.get(key)), _number(panel.get(spread)) if spread else None
        if value is not None:
            found.append(Bar(name, value, math.nan if error is None else error, "", {}))
    return found


def _caption(panel: Mapping[str, Any]) -> str:
    parts = [f"panel {panel['budget']}"] if isinstance(panel.get("budget"), str) else []
    parts += [f"{name} left out: {why}" for name, why in _mapping(panel.get("left_out")).items()]
    return ". ".join(part[:1].upper() + part[1:] for part in parts) + "." * bool(parts)


def _chart(bars: list[Bar]) -> str:
    bottom = _TOP + _STEP * len(bars)
    parts = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = _LEFT + _WIDTH * tick
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP - 12}" y2="{bottom - 10:.1f}"/>'
        )
        parts.append(svg_text(x, _TOP - 20, f"{100 * tick:.0f}%", "middle"))
    for number, bar in enumerate(bars):
        y = _TOP + _STEP * number
        parts.append(svg_text(_LEFT - 12, y + _BAR + 4, bar.name, "end", "label"))
        parts.append(_bar("dense", y, 1.0, f"{bar.name}, dense: 100%"))
        shown = f"{100 * bar.kept:.1f}% ± {100 * bar.spread:.1f}"
        parts.append(_bar("attention", y + _BAR + 2, bar.kept, f"{bar.name}, slim: {shown}"))
        low, high = (
            _LEFT + _WIDTH * min(max(bar.kept + side * 2 * bar.spread, 0.0), 1.0) for side in (-1, 1)
        )
        middle = y + 1.5 * _BAR + 2
        parts.append(f'<path class="whisker" d="M{low:.1f} {middle:.1f}H{high:.1f}"/>')
        parts.append(svg_text(_LEFT + _WIDTH + 10, y + 2 * _BAR, shown, "start", "axis"))
    key = bottom + 6
    for place, (series, name) in enumerate((("dense", "dense"), ("attention", "slim"))):
        x = _LEFT + 90 * place
        parts.append(f'<rect class="bar {series}" x="{x}" y="{key - 9:.1f}" width="18" height="9" rx="2"/>')
        parts.append(svg_text(x + 24, key, name, "start", "axis"))
    described = "; ".join(f"{bar.name} {100 * bar.kept:.1f}%" for bar in bars)
    return svg(
        _LEFT + _WIDTH + _RIGHT, key + 12, f"Part of dense's capabilities that is kept: {described}", parts
    )


def _bar(series: str, y: float, share: float, label: str) -> str:
    return (
        f'<rect class="bar {series}" x="{_LEFT}" y="{y:.1f}" width="{_WIDTH * share:.1f}" height="{_BAR}" rx="2">'
        f"<title>{escape(label)}</title></rect>"
    )


def _number(value: Any) -> float | None:
    found = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if found else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}

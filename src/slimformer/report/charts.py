"""The two charts of a plan's page, as SVG whose colours come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape

from slimformer.report.summary import NAMES, Step, Summary

_LEFT, _RIGHT, _TOP = 64.0, 16.0, 26.0
_PLOT_WIDTH, _PLOT_HEIGHT = 880.0, 280.0
_SERIES = ("attention", "mlp")
# Similarities crowd towards 1, so the axis is logarithmic in the distance from 1.
_TICKS = (-1.0, 0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999, 0.99999)
_NEAREST = 1e-5
_CELL, _GAP = 18.0, 6.0
# A short chart stands beside the list of removals, a long one above it.
_SHORT_WIDTH, SHORT_STEPS = 380.0, 12
_CHARACTER = 6.6


def similarity_chart(summary: Summary) -> str:
    """Similarity of every sublayer over the layers, and below it the model with what was dropped.

    Without measured similarities only the model is drawn.
    """
    drawn = [kind for kind in _SERIES if summary.similarity[kind]]
    step = _PLOT_WIDTH / summary.layers
    top = _TOP + (_PLOT_HEIGHT + 22 if drawn else 0)
    height = top + 2 * (_CELL + _GAP) + 40
    parts = [_guides(summary, step, top)]
    if drawn:
        parts.append(_similarity_plot(summary, drawn, step))
    parts.extend(_strip(summary, kind, step, top + row * (_CELL + _GAP)) for row, kind in enumerate(_SERIES))
    below = top + 2 * (_CELL + _GAP) + 10
    every = _every(step, _CHARACTER * (len(str(summary.layers - 1)) + 1))
    parts.extend(
        svg_text(_center(layer, step), below, str(layer), "middle")
        for layer in range(0, summary.layers, every)
    )
    parts.append(svg_text(_LEFT + _PLOT_WIDTH / 2, below + 20, "layer", "middle", "axis"))
    dropped = ", ".join(f"{NAMES[kind]} {layer}" for kind in _SERIES for layer in summary.dropped[kind])
    shown = "Similarity of every sublayer's input and output" if drawn else "The model's sublayers"
    return svg(_LEFT + _PLOT_WIDTH + _RIGHT, height, f"{shown}. Dropped: {dropped or 'none'}.", parts)


def divergence_chart(summary: Summary) -> str:
    """Divergence from dense against the number of drops; empty when no step's divergence is known."""
    known = [(n, s) for n, s in enumerate(summary.steps, start=1) if s.divergence is not None]
    if not known:
        return ""
    width = _SHORT_WIDTH if len(summary.steps) <= SHORT_STEPS else _PLOT_WIDTH
    step = width / (len(summary.steps) + 0.3)
    ticks = round_ticks(max(s.divergence or 0.0 for _, s in known))
    bottom = _TOP + _PLOT_HEIGHT

    def place(number: int, value: float) -> tuple[float, float]:
        return _LEFT + number * step, bottom - _PLOT_HEIGHT * max(value, 0.0) / ticks[-1]

    parts = [svg_text(_LEFT - 8, 11, summary.divergence_name, "start", "axis")]
    for tick in ticks:
        _, y = place(0, tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(_LEFT - 8, y + 4, f"{tick:g}", "end"))
    for number in range(0, len(summary.steps) + 1, _every(step, 22)):
        parts.append(svg_text(_LEFT + number * step, bottom + 18, str(number), "middle"))
    unit = "blocks" if all(s.kind == "block" for s in summary.steps) else "sublayers"
    parts.append(svg_text(_LEFT + width / 2, bottom + 38, f"{unit} dropped", "middle", "axis"))
    points = [place(0, 0.0), *(place(number, s.divergence or 0.0) for number, s in known)]
    parts.append(f'<path class="line total" d="{_path(points)}"/>')
    every = _every(step, _CHARACTER * 5)
    for (x, y), (number, removed) in zip(points[1:], known, strict=True):
        value = f"{removed.divergence:.4g}" if removed.divergence is not None else ""
        label = f"{number}. {removed.name}: {value}"
        parts.append(f'<circle class="dot total" cx="{x:.1f}" cy="{y:.1f}" r="4">{_title(label)}</circle>')
        if number % every == 0 or number == len(summary.steps):
            parts.append(svg_text(x - 7, y - 8, _short(removed), "end", "label"))
    label = f"{summary.divergence_name} after each of {len(summary.steps)} removals"
    return svg(_LEFT + width + _RIGHT, bottom + 48, label, parts)


def marker(kind: str, x: float, y: float, size: float, dropped: bool, label: str) -> str:
    """One sublayer: a disc for attention, a diamond for an MLP, in a ring with a cross where it was dropped."""
    if kind == "attention":
        shape = f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    else:
        s = size * 1.25
        points = f"{x:.1f},{y - s:.1f} {x + s:.1f},{y:.1f} {x:.1f},{y + s:.1f} {x - s:.1f},{y:.1f}"
        shape = f'<polygon class="dot {kind}" points="{points}"/>'
    if dropped:
        shape += f'<circle class="ring {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{size + 4:.1f}"/>'
    return f"<g>{_title(label)}{shape}</g>"


def _similarity_plot(summary: Summary, drawn: list[str], step: float) -> str:
    values = [value for kind in drawn for value in summary.similarity[kind]]
    ticks = _similarity_ticks(min(values), max(values))
    low, high = _stretched(ticks[0]), _stretched(ticks[-1])

    def height(value: float) -> float:
        return _TOP + _PLOT_HEIGHT * (high - _stretched(value)) / (high - low)

    parts = [svg_text(_LEFT - 8, 11, "cosine similarity", "start", "axis")]
    for tick in ticks:
        y = height(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _PLOT_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(svg_text(_LEFT - 8, y + 4, f"{tick:g}", "end"))
    size = max(2.5, min(4.5, step / 4))
    for kind in drawn:
        points = [
            (_center(layer, step), height(value)) for layer, value in enumerate(summary.similarity[kind])
        ]
        parts.append(f'<path class="line {kind}" d="{_path(points)}"/>')
        for layer, (x, y) in enumerate(points):
            dropped = layer in summary.dropped[kind]
            label = f"{NAMES[kind]} {layer}: {summary.similarity[kind][layer]:.4f}" + (
                ", dropped" if dropped else ""
            )
            parts.append(marker(kind, x, y, size, dropped, label))
    return "".join(parts)


def _guides(summary: Summary, step: float, bottom: float) -> str:
    """A pale column behind every layer that lost something, from the plot down to the strip."""
    layers = sorted({layer for kind in _SERIES for layer in summary.dropped[kind]})
    return "".join(
        f'<rect class="guide" x="{_center(layer, step) - step / 2:.1f}" y="{_TOP}" width="{step:.1f}" '
        f'height="{bottom + 2 * (_CELL + _GAP) - _TOP:.1f}"/>'
        for layer in layers
    )


def _strip(summary: Summary, kind: str, step: float, y: float) -> str:
    """One row of cells, filled where the sublayer runs, crossed or numbered where it was dropped."""
    order = summary.order()
    inset = min(3.0, step * 0.12)
    parts = [svg_text(_LEFT - 8, y + _CELL / 2 + 4, NAMES[kind], "end")]
    for layer in range(summary.layers):
        dropped = layer in summary.dropped[kind]
        label = f"{NAMES[kind]} {layer}: {'dropped' if dropped else 'runs'}"
        if dropped and summary.ordered:
            label += f", removal {order[kind, layer]}"
        x = _center(layer, step)
        parts.append(
            f'<rect class="{"cell dropped" if dropped else "cell"} {kind}" x="{x - step / 2 + inset:.1f}" '
            f'y="{y:.1f}" width="{step - 2 * inset:.1f}" height="{_CELL}" rx="3">{_title(label)}</rect>'
        )
        if dropped:
            fits = summary.ordered and step >= _CHARACTER * len(str(len(summary.steps))) + 8
            parts.append(
                svg_text(x, y + _CELL / 2 + 4, str(order[kind, layer]) if fits else "×", "middle", "label")
            )
    return "".join(parts)


def _similarity_ticks(low: float, high: float) -> list[float]:
    """The ticks from just below the lowest value to just above the highest."""
    first = max((i for i, tick in enumerate(_TICKS) if tick <= low), default=0)
    last = min((i for i, tick in enumerate(_TICKS) if tick >= high), default=len(_TICKS) - 1)
    if first == last:
        first, last = max(0, first - 1), min(len(_TICKS) - 1, last + 1)
    return list(_TICKS[first : last + 1])


def _stretched(value: float) -> float:
    return -math.log10(max(1.0 - value, _NEAREST))


def round_ticks(highest: float) -> list[float]:
    """Ticks from 0 to at least `highest` in steps of 1, 2 or 5 times a power of ten."""
    return ticks_around(0.0, max(highest, 1e-9))


def ticks_around(low: float, high: float, parts: int = 4) -> list[float]:
    """Ticks from at most `low` to at least `high` in steps of 1, 2 or 5 times a power of ten, about so many of them.

    Example:
        >>> ticks_around(0.97, 1.62)
        [0.8, 1.0, 1.2, 1.4, 1.6, 1.8]
    """
    rough = max(high - low, 1e-9) / parts
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1.0, 2.0, 5.0, 10.0) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(place * step, 12) for place in range(first, max(last, first + 1) + 1)]


def _every(step: float, needed: float) -> int:
    """Label every so many places, so that labels of the needed width do not touch."""
    return next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000, 10_000) if n * step >= needed or n == 10_000)


def _short(step: Step) -> str:
    return {"attention": "A", "mlp": "M", "block": "B"}[step.kind] + str(step.layer)


def _center(layer: int, step: float) -> float:
    return _LEFT + (layer + 0.5) * step


def _path(points: Iterable[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def svg_text(x: float, y: float, content: str, anchor: str, style: str = "tick") -> str:
    """A text element; `anchor` is which of its ends lies at `x`."""
    return f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(content)}</text>'


def _title(content: str) -> str:
    return f"<title>{escape(content)}</title>"


def svg(width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """A drawing of this size whose colours come from the page's style sheet."""
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="width:{width:.0f}px" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )

"""An SVG file for light ground and one for dark, since a picture in a README cannot ask the page which it stands on."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

# Ink, muted, line, and the four colours of series; each pair is legible on the ground of its theme without a fill.
_COLOURS = {
    "light": ("#1b1f24", "#59636e", "#d1d9e0", "#0a63c2", "#b3500a", "#24705a", "#8250df"),
    "dark": ("#e8eaed", "#9198a1", "#3d444d", "#6db3ff", "#f2a55f", "#66c9a6", "#c297ff"),
}
THEMES = tuple(_COLOURS)
_SHOWN = 1.25


def drawing(theme: str, width: float, height: float, label: str, parts: Iterable[str]) -> str:
    """A whole SVG file of this size in the colours of a theme; its ground is transparent."""
    ink, muted, line, *series = _COLOURS[theme]
    rules = [
        'text{font:14px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}',
        f".ink{{fill:{ink}}}.muted{{fill:{muted}}}.strong{{fill:{ink};font-weight:600}}",
        f".code{{fill:{ink};font:600 14px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}}",
        f".small{{fill:{muted};font-size:12px}}",
        f".line{{stroke:{line};stroke-width:1;fill:none}}.arrow{{stroke:{muted};stroke-width:1.5;fill:none}}",
        *(
            f".s{i}{{fill:{c};stroke:{c}}}.o{i}{{fill:none;stroke:{c};stroke-width:2}}"
            f".p{i}{{fill:none;stroke:{c};stroke-width:1.5;stroke-opacity:.5}}.t{i}{{fill:{c};font-weight:600}}"
            for i, c in enumerate(series)
        ),
    ]
    # Drawn small, so that it can be read on a telephone, and shown larger where there is room.
    size = f'viewBox="0 0 {width:g} {height:g}" width="{_SHOWN * width:g}" height="{_SHOWN * height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(label)}">'
    return "\n".join([head, f"<style>{''.join(rules)}</style>", *parts, "</svg>"]) + "\n"


def text(
    x: float, y: float, content: str, style: str = "muted", anchor: str = "start", turned: bool = False
) -> str:
    """A text element; `anchor` is which of its ends lies at `x`."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    return (
        f'<text class="{style}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(content)}</text>'
    )


def path(points: Iterable[tuple[float, float]], style: str) -> str:
    """Straight lines through points."""
    return f'<path class="{style}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>'

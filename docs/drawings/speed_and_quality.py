"""Speed against what is kept, of every method that an embedding model was measured with on one machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docs.drawings.canvas import drawing, path, text

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_SOURCES = ("encoder_repair", "encoder_narrow", "encoder_elimination")
_LEFT, _TOP, _WIDTH, _HEIGHT = 52.0, 98.0, 414.0, 300.0
_SPEEDS, _KEPT = (1.0, 2.75), (72.0, 106.0)


@dataclass(frozen=True)
class Series:
    """The points of one method, (speed, what is kept in percent), with a name at one of them.

    Attributes:
        name: The method.
        colour: Which colour it has.
        points: From the slowest to the fastest.
        hollow: Whether its points are rings.
        at: Which point the name stands at.
        shift: Where the name stands from there, in pixels.
        anchor: Which end of the name lies there.
    """

    name: str
    colour: int
    points: list[tuple[float, float]]
    hollow: bool = False
    at: int = -1
    shift: tuple[float, float] = (0.0, -12.0)
    anchor: str = "middle"


def speed_and_quality(theme: str) -> str:
    """The drawing, from the result files.

    Raises:
        ValueError: If the files are of different devices, whose times belong on no common axis.
    """
    files = {name: json.loads((_RESULTS / f"{name}.json").read_text("utf-8")) for name in _SOURCES}
    devices = {content["device"] for content in files.values()}
    if len(devices) != 1:
        raise ValueError(f"times of different devices belong on no common axis: {', '.join(sorted(devices))}")
    (device,) = devices
    parts = [
        text(4, 18, "all-MiniLM-L6-v2: speed against what is kept", "strong"),
        text(4, 38, f"Cranfield retrieval, {device}, float32"),
        text(4, 58, "Up and to the right is better."),
        *_axes(),
    ]
    for series in _series(files):
        parts += _drawn(series)
    label = (
        "Speed of embedding beside the unpatched model against the retrieval quality that is kept, per method"
    )
    return drawing(theme, _LEFT + _WIDTH + 14, _TOP + _HEIGHT + 54, label, parts)


def _series(files: dict[str, Any]) -> list[Series]:
    repair, narrow, eliminated = (files[name]["measurements"] for name in _SOURCES)
    quality = {(m["parameters"].get("dropped"), m["candidate"]): m["values"].get("cranfield") for m in repair}
    times = {m["candidate"]: m["milliseconds"]["p50"] for m in repair if m["milliseconds"]}
    dense, layers = quality["none", "dense"], ("layer 4", "layers 2, 4", "layers 1, 2, 4")

    def dropped(state: str) -> list[tuple[float, float]]:
        return [(times["dense"] / times[name], 100 * quality[name, state] / dense) for name in layers]

    units = {m["candidate"]: m["values"] for m in narrow}
    held_out = units["unpatched"]["held_out"]
    cut = [
        (found["one_call"], 100 * found["held_out"] / held_out)
        for name, found in units.items()
        if "hidden units" in name
    ]
    tokens = {m["candidate"]: m["values"] for m in eliminated if m["parameters"]["collection"] == "cranfield"}
    chosen = ("90% from layer 2 on, mean of those left", "50% from layer 4 on, mean of those left")
    unpatched = tokens["unpatched"]
    left = [
        (tokens[c]["speedup"] / unpatched["speedup"], 100 * tokens[c]["nDCG@10"] / unpatched["nDCG@10"])
        for c in chosen
    ]
    patch = [
        (units["slimformer.patch(model)"]["one_call"], 100.0),
        (times["dense"] / times["slimformer.patch(model)"], 100.0),
    ]
    return [
        Series("LayerDrop, not repaired", 0, dropped("as calibrated"), True, 1, (10, -10), "start"),
        Series("TokenElimination", 3, left, False, 1, (-34, 20), "middle"),
        Series("NarrowMlp", 1, sorted(cut), False, 2, (9, 8), "start"),
        Series("LayerDrop and repair", 0, dropped("repaired"), False, 2, (34, -22), "end"),
        Series("patch alone", 2, patch, False, 0, (4, -13), "middle"),
    ]


def _axes() -> Iterator[str]:
    for tick in (75, 80, 85, 90, 95, 100, 105):
        y = _place(1, tick)[1]
        yield path([(_LEFT, y), (_LEFT + _WIDTH, y)], "arrow" if tick == 100 else "line")
        yield text(_LEFT - 8, y + 5, f"{tick}%", anchor="end")
    for number in (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5):
        x, y = _place(number, _KEPT[0])
        yield path([(x, y), (x, y + 5)], "line")
        yield text(x, y + 22, f"{number:g}×", anchor="middle")
    yield path([_place(_SPEEDS[0], _KEPT[0]), _place(_SPEEDS[1], _KEPT[0])], "line")
    middle = _LEFT + _WIDTH / 2
    yield text(middle, _TOP + _HEIGHT + 44, "texts per second, beside the unpatched model", "ink", "middle")
    yield text(4, _TOP - 10, "nDCG@10, beside the unpatched model", "ink")
    x, y = _place(1.0, 100.0)
    yield f'<circle class="ink" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    yield text(x + 8, y + 20, "unpatched", "ink")


def _drawn(series: Series) -> Iterator[str]:
    places = [_place(*point) for point in series.points]
    yield path(places, f"p{series.colour}")
    for x, y in places:
        style = f"{'o' if series.hollow else 's'}{series.colour}"
        yield f'<circle class="{style}" cx="{x:.1f}" cy="{y:.1f}" r="5"/>'
    (x, y), (right, down) = places[series.at], series.shift
    yield text(x + right, y + down, series.name, f"t{series.colour}", series.anchor)


def _place(speed: float, kept: float) -> tuple[float, float]:
    across = (speed - _SPEEDS[0]) / (_SPEEDS[1] - _SPEEDS[0])
    up = (kept - _KEPT[0]) / (_KEPT[1] - _KEPT[0])
    return _LEFT + _WIDTH * across, _TOP + _HEIGHT * (1 - up)

"""The candidates of an optimisation as a picture of characters."""

from __future__ import annotations

from rich.text import Text

from slimformer.plans.plan import Plan
from slimformer.report.charts import round_ticks, ticks_around
from slimformer.report.optimization.points import Point, found_in, points_of, shown_points

_WIDTH, _HEIGHT = 64, 12
_LABEL = 7
# Of two in one place, the one that stands further behind is seen.
_OTHER, _REPAIRED, _FRONT, _CHOSEN = "·", "+", "○", "●"
_ORDER = (_OTHER, _REPAIRED, _FRONT, _CHOSEN)


def optimize_curve(plan: Plan) -> Text:
    """Speed from left to right, what is kept from bottom to top; empty where less than two plans were tried.

    Args:
        plan: A plan that `slimformer.optimize` made.

    Example:
        >>> from slimformer import LayerDrop
        >>> tried = [{"what": "", "speedup": 1 + lost, "lost": {}, "mean_lost": lost} for lost in (0.0, 0.1)]
        >>> "speed, dense is 1" in optimize_curve(Plan([LayerDrop()], measured={"optimize": {"candidates": tried}}))
        True
    """
    found = found_in(plan)
    points = shown_points(points_of(found), found)
    if len(points) < 2:
        return Text()
    down = round_ticks(max(0.02, *(point.mean for point in points)))
    speeds = [1.0, *(point.speedup for point in points)]
    along = ticks_around(min(speeds), max(max(speeds), min(speeds) + 0.1), 7)

    def column(speed: float) -> int:
        return round((_WIDTH - 1) * (speed - along[0]) / (along[-1] - along[0]))

    def row(lost: float) -> int:
        return round(_HEIGHT * min(max(lost, 0.0) / down[-1], 1.0))

    grid = [[" "] * _WIDTH for _ in range(_HEIGHT + 1)]
    allowed = found.get("max_loss")
    limited = isinstance(allowed, (int, float)) and 0 < allowed <= down[-1]
    if limited:
        grid[row(float(allowed or 0.0))] = ["┄"] * _WIDTH
    for point in sorted(points, key=lambda point: _ORDER.index(_mark(point))):
        grid[row(point.mean)][column(point.speedup)] = _mark(point)
    labels = {row(tick): f"{100 * (1 - tick):.3g}%" for tick in down}
    lines = ["kept of dense, on average"]
    lines += [f"{labels.get(number, ''):>{_LABEL}} ┤{''.join(of)}" for number, of in enumerate(grid)]
    lines.append(" " * (_LABEL + 1) + "└" + "─" * _WIDTH)
    lines.append(_labelled({column(speed): f"{speed:g}×" for speed in along}))
    goal = "size of dense over its own" if found.get("goal") == "memory" else "speed, dense is 1"
    keys = [
        (_CHOSEN, "chosen"),
        (_FRONT, "none is faster at no more loss"),
        (_REPAIRED, "repaired"),
        (_OTHER, "tried"),
    ]
    present = {_mark(point) for point in points}
    said = [f"{mark} {words}" for mark, words in keys if mark in present]
    said += ["┄ asked for"] if limited else []
    lines += [goal.center(_WIDTH + _LABEL), "  ".join(said)]
    return Text("\n".join(line.rstrip() for line in lines))


def _mark(point: Point) -> str:
    if point.chosen:
        return _CHOSEN
    if point.front and not point.repaired:
        return _FRONT
    return _REPAIRED if point.repaired else _OTHER


def _labelled(labels: dict[int, str]) -> str:
    line = [" "] * (_LABEL + 2 + _WIDTH + 8)
    for place, words in labels.items():
        start = _LABEL + 2 + place - len(words) // 2
        line[start : start + len(words)] = words
    return "".join(line)

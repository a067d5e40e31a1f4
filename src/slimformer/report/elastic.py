"""The grid of an elastic calibration: quality at every exit and width, the Pareto front marked."""

from __future__ import annotations

from html import escape

from rich.table import Table
from rich.text import Text

from slimformer.errors import PlanError
from slimformer.evaluation.elastic_grid import Grid
from slimformer.plans.plan import Plan
from slimformer.report.charts import svg_text

# What the page's style sheet says of these classes, for a file of its own on light or on dark ground.
_STYLE = (
    "<style>svg{font:11.5px system-ui,sans-serif}.cell{fill:#24705a}.ring{fill:none;stroke:#24705a;stroke-width:2}"
    ".tick,.axis{fill:#5a626c}.label{fill:#1b1f24;font-weight:600}@media (prefers-color-scheme:dark)"
    "{.cell{fill:#66c9a6}.ring{stroke:#66c9a6}.tick,.axis{fill:#a2abb6}.label{fill:#e8eaed}}</style>"
)
_LEFT, _TOP, _BELOW = 64.0, 30.0, 44.0
_WIDTH, _HEIGHT, _GAP = 76.0, 30.0, 4.0


def grid_of(plan: Plan) -> Grid | None:
    """The grid that a plan was chosen from; None if it carries none."""
    return Grid.from_dict(plan.provenance.get("elastic"))


def grid_table(plan: Plan) -> Table | None:
    """The grid for a terminal, points on the Pareto front starred; None if the plan carries none.

    Example:
        >>> from slimformer import EarlyExit
        >>> grid = {"name": "nDCG@10", "layers": [1, 2], "dimensions": [8, 4], "scores": [[0.3, 0.2], [0.4, 0.3]]}
        >>> grid_table(Plan([EarlyExit(1)], provenance={"elastic": grid})).row_count
        2
    """
    grid = grid_of(plan)
    if grid is None:
        return None
    front = set(grid.front())
    table = Table(
        title=Text(f"{grid.name} by layers that run and width of the embedding"),
        title_justify="left",
        caption=Text("* on the Pareto front: nothing with fewer layers or dimensions reaches it"),
        caption_justify="left",
    )
    table.add_column("layers", justify="right")
    for dimension in grid.dimensions:
        table.add_column(str(dimension), justify="right")
    for layer, row in zip(grid.layers, grid.scores, strict=True):
        cells = (
            f"{score:#.4g}{'*' if (layer, dimension) in front else ' '}"
            for dimension, score in zip(grid.dimensions, row, strict=True)
        )
        table.add_row(_name(grid, layer, plan.exit), *(Text(cell) for cell in cells))
    return table


def elastic_section(plan: Plan) -> str:
    """The part of a plan's page with the grid; empty if the plan carries none."""
    grid = grid_of(plan)
    if grid is None:
        return ""
    text = (
        f"{grid.name}. Every row is an exit, by the layers that run; every column the width an embedding is cut to "
        "(truncate_dim). The fuller a cell, the better; ringed points are the Pareto front: nothing with fewer "
        "layers or dimensions reaches them."
    )
    return (
        f"<section><h2>Depth and width</h2><p>{escape(text)}</p>"
        f'<div class="scroll">{elastic_chart(grid, plan.exit)}</div></section>'
    )


def elastic_chart(grid: Grid, chosen: int | None = None) -> str:
    """The grid as an SVG, its colours from the page's style sheet.

    Args:
        grid: What was measured.
        chosen: The exit of the plan, whose row is named so.
    """
    values = [score for row in grid.scores for score in row]
    low, high = min(values), max(values)
    front = set(grid.front())
    parts = []
    for column, dimension in enumerate(grid.dimensions):
        parts.append(svg_text(_middle(column), _TOP - 10, str(dimension), "middle"))
    for index, (layer, row) in enumerate(zip(grid.layers, grid.scores, strict=True)):
        y = _TOP + index * (_HEIGHT + _GAP)
        parts.append(svg_text(_LEFT - 10, y + _HEIGHT / 2 + 4, _name(grid, layer, chosen), "end"))
        for column, (dimension, score) in enumerate(zip(grid.dimensions, row, strict=True)):
            filled = 0.08 + 0.5 * ((score - low) / (high - low) if high > low else 1.0)
            on_front = (layer, dimension) in front
            label = f"{layer} layers, {dimension} dimensions: {score:#.4g}{', on the Pareto front' if on_front else ''}"
            box = f'x="{_LEFT + column * (_WIDTH + _GAP):.1f}" y="{y:.1f}" width="{_WIDTH}" height="{_HEIGHT}" rx="4"'
            parts.append(
                f'<rect class="cell total" style="fill-opacity:{filled:.3f}" {box}><title>{label}</title></rect>'
            )
            if on_front:
                parts.append(f'<rect class="ring total" {box}/>')
            parts.append(svg_text(_middle(column), y + _HEIGHT / 2 + 4, f"{score:#.4g}", "middle", "label"))
    below = _TOP + len(grid.layers) * (_HEIGHT + _GAP) + 14
    across = len(grid.dimensions) * (_WIDTH + _GAP)
    parts.append(
        svg_text(_LEFT + across / 2, below, "dimensions (above) and layers that run (left)", "middle", "axis")
    )
    label = escape(f"{grid.name} by layers that run and width of the embedding")
    width, height = _LEFT + across + 16, below + _BELOW - 30
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="width:{width:.0f}px" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def grid_picture(plan: Plan) -> str:
    """The grid as an SVG file of its own, with its style.

    Raises:
        PlanError: If the plan carries no grid.
    """
    grid = grid_of(plan)
    if grid is None:
        raise PlanError(
            "The plan carries no grid of depth and width. slimformer calibrate exit measures one."
        )
    head, _, body = elastic_chart(grid, plan.exit).partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{_STYLE}{body}\n'


def _name(grid: Grid, layer: int, chosen: int | None) -> str:
    if layer == chosen:
        return f"▸ {layer}"
    return f"dense {layer}" if layer == grid.layers[-1] else str(layer)


def _middle(column: int) -> float:
    return _LEFT + column * (_WIDTH + _GAP) + _WIDTH / 2

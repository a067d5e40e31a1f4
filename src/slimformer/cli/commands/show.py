"""`slimformer show`: print a plan, or write its page."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.output import note, print_json, print_tables, write_text


def show(
    plan: Annotated[
        str, typer.Argument(metavar="PLAN", show_default=False, help="A plan's folder, file or Hub id.")
    ],
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", show_default=False, help="Also write one self-contained HTML page."),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Also write the grid of an elastic plan as a picture."
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Print what PLAN drops, why, and what was measured with it; of a Hub id weights are not downloaded.

    Of an exported model its card is printed.
    """
    if html is not None and html.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"The page is written to a file that ends in .html, got {html}.")
    if svg is not None and svg.suffix.lower() != ".svg":
        raise typer.BadParameter(f"The picture is written to a file that ends in .svg, got {svg}.")

    from rich.markdown import Markdown

    from slimformer.plans.shown import read_shown
    from slimformer.report import (
        comparison_table,
        curve_table,
        grid_picture,
        grid_table,
        methods_table,
        narrow_table,
        optimize_table,
        panel_table,
        plan_page,
        plan_table,
        predictor_table,
        repair_table,
        router_table,
        temperature_table,
    )

    found = read_shown(plan)
    if isinstance(found, str):
        if as_json or html is not None or svg is not None:
            raise typer.BadParameter(f"{plan} is an exported model, of which only the card can be shown.")
        print_tables(Markdown(found))
        return
    if html is not None:
        write_text(html, plan_page(found))
        note(f"The page is in {html}.")
    if svg is not None:
        write_text(svg, grid_picture(found))
        note(f"The picture is in {svg}.")
    if as_json:
        print_json(found.to_dict())
    else:
        tables = (grid_table(found), temperature_table(found), narrow_table(found))
        swept = [table for table in tables if table is not None]
        compared = comparison_table(found.measured, "measured")
        others = (
            methods_table(found),
            router_table(found),
            predictor_table(found),
            curve_table(found),
            *swept,
            optimize_table(found),
            repair_table(found),
            panel_table(found.measured),
            compared,
        )
        # A plan without any method drops nothing, which the first table says.
        dropped = [plan_table(found)] if found.drops or not found.methods else []
        print_tables(*dropped, *(table for table in others if table.row_count))

"""`slimformer calibrate exit`: how many layers an embedding model needs."""

from __future__ import annotations

from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.choice import choose


def exit_early(
    model: options.Model,
    output: options.Output,
    data: options.TaskData = None,
    layer: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, show_default=False, help="The exit: how many layers run."),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            show_default=False,
            help="Instead: the lowest exit that loses at most this fraction.",
        ),
    ] = None,
    head: Annotated[bool, typer.Option(help="Fit a linear head for every exit on the texts.")] = True,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    more: options.More = None,
) -> None:
    """Let an embedding model stop early, by the quality of every exit at every width.

    After Ctrl-C the same command goes on. slimformer show draws the grid.
    --set takes layers, dimensions, batch_size, fit_on, hold_out and text_field.
    """
    if (layer is None) == (max_loss is None):
        raise typer.BadParameter("Say where to exit: give either --layer or --max-loss.")
    choose(
        "EarlyExit",
        model,
        output,
        data=data,
        fields={"layer": layer},
        options={"max_loss": max_loss, "head": head},
        more=more,
        embeddings=True,
        device=device,
        dtype=dtype.value,
        force=force,
        table="grid_table",
    )

"""`slimformer calibrate eliminate`: which tokens of a long prompt can leave, and from which layer on."""

from __future__ import annotations

from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse
from slimformer.cli.choice import choose


def eliminate(
    ctx: typer.Context,
    model: options.Model,
    output: options.Output,
    data: options.Data = None,
    max_loss: Annotated[
        float,
        typer.Option(metavar="X", min=0, help="The most, in nats per token of an answer."),
    ] = 0.05,
    length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default="2048, or 4096",
            help="Tokens of a prompt, as yours have.",
        ),
    ] = None,
    predictor: Annotated[
        bool, typer.Option("--predictor", help="Train what says early which tokens matter.")
    ] = False,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="LAYER=KEEP,...",
            show_default=False,
            help="Its layers and which fraction stays, as 10=0.5,15=0.25.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Updates of its weights.")] = 400,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    more: options.More = None,
) -> None:
    """Choose from which layer on which fraction of a long prompt's tokens can leave MODEL.

    After Ctrl-C the same command goes on. --set takes scorer, window, block, answer, texts, seed and
    others; with --predictor size, rank, learning_rate, rows, precision and others.
    """
    if predictor:
        refuse(ctx, {"max_loss": "a schedule that is chosen; --predictor takes --schedule"})
        if schedule is None:
            raise typer.BadParameter(
                "--predictor takes --schedule LAYER=KEEP,..., such as slimformer calibrate eliminate chooses without."
            )
    else:
        refuse(ctx, dict.fromkeys(("schedule", "steps"), "--predictor"))
    choose(
        "TokenElimination",
        model,
        output,
        data=data,
        fields={"scorer": "predictor"} if predictor else {},
        options={"length": length, **({"schedule": _read(schedule)} if schedule else {"max_loss": max_loss})},
        training={"steps": steps} if predictor else None,
        more=more,
        device=device,
        dtype=dtype.value,
        force=force,
        table="predictor_table" if predictor else "curve_table",
    )


def _read(schedule: str) -> dict[int, float]:
    found = {}
    for entry in schedule.split(","):
        layer, _, keep = entry.partition("=")
        try:
            found[int(layer)] = float(keep)
        except ValueError as error:
            raise typer.BadParameter(
                f"--schedule takes entries such as 15=0.25, separated by commas; got {entry!r}."
            ) from error
    return found

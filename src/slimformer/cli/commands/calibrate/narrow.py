"""`slimformer calibrate narrow`: how few hidden units an embedding model's MLPs need."""

from __future__ import annotations

from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.choice import choose


def narrow(
    model: options.Model,
    output: options.Output,
    data: options.TaskData = None,
    keep: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0, max=1, show_default=False, help="The fraction of hidden units that stays."
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            min=0,
            show_default=False,
            help="Instead: the narrowest that lose at most this fraction.",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    more: options.More = None,
) -> None:
    """Give an embedding model narrow MLPs, fitted in closed form: faster embeddings.

    For models of BERT's structure; the MLP of the last layer becomes linear. --set takes batch_size, fit_on,
    hold_out and text_field.
    """
    if (keep is None) == (max_loss is None):
        raise typer.BadParameter("Say how narrow: give either --keep or --max-loss.")
    choose(
        "NarrowMlp",
        model,
        output,
        data=data,
        fields={},
        options={"keep": keep, "max_loss": max_loss},
        more=more,
        embeddings=True,
        device=device,
        dtype=dtype.value,
        force=force,
        table="narrow_table",
    )

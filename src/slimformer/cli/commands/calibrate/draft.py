"""`slimformer calibrate draft`: what a model leaves out when it drafts for itself."""

from __future__ import annotations

from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.choice import choose


def draft(
    model: options.Model,
    output: options.Output,
    drop: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="Stop after so many removals, not where more are slower.",
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="How many prompts the model answers."),
    ] = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    more: options.More = None,
) -> None:
    """Choose the plan that drafts best for its dense self: the same tokens, sooner.

    By acceptance on the model's own words and by what steps cost here. Use it with SelfSpeculation(FOLDER). --set takes
    kinds and new_tokens.
    """
    choose(
        "SelfSpeculation",
        model,
        output,
        data=None,
        fields={},
        options={"drop": drop, "prompts": prompts},
        more=more,
        device=device,
        dtype=dtype.value,
        force=force,
        table="plan_table",
    )

"""`slimformer calibrate drop`: which attentions and MLPs can go."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.choice import choose
from slimformer.cli.settings import Settings

# How many tokens a fitted filter reads.
_TAPS = 4


class Kinds(str, Enum):
    """What may be dropped."""

    attention = "attention"
    mlp = "mlp"
    joint = "attention,mlp"
    block = "block"


class Replace(str, Enum):
    """What stands in for a dropped sublayer."""

    nothing = "nothing"
    mean = "mean"
    filter = "filter"


class Budget(str, Enum):
    """How much time calibration may take."""

    quick = "quick"
    standard = "standard"
    thorough = "thorough"


def drop(
    model: options.Model,
    output: options.Output,
    data: options.AnyData = None,
    drop: Annotated[
        int | None, typer.Option(metavar="N", min=1, show_default=False, help="Stop after so many drops.")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=0, show_default=False, help="Stop before the divergence from dense passes this."
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(
            metavar="X", min=1, show_default=False, help="Stop once so many times as fast as dense."
        ),
    ] = None,
    kinds: Annotated[
        Kinds,
        typer.Option(
            metavar="KINDS", help="What is dropped: attention, mlp, attention,mlp or block (a whole layer)."
        ),
    ] = Kinds.attention,
    replace: Annotated[
        Replace,
        typer.Option(metavar="WHAT", help="What stands in its place: nothing, mean or filter."),
    ] = Replace.nothing,
    budget: Annotated[
        Budget | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="How much text is read: quick, standard or thorough. Left out: quick on a CPU, standard on a GPU.",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    more: options.More = None,
) -> None:
    """Choose the attentions and MLPs that MODEL can lose: faster generation, a smaller cache.

    Say when to stop: --drop, --max-loss or --speedup. After Ctrl-C the same command goes on.
    --set takes selection, task, taps, hold_out, seed and text_field.
    """
    if drop is None and max_loss is None and speedup is None:
        raise typer.BadParameter("Say when to stop: give --drop, --max-loss or --speedup.")
    filters = replace is Replace.filter
    if not filters and "taps" in Settings(more).left:
        raise typer.BadParameter("--set taps=... goes with --replace filter.")
    choose(
        "LayerDrop",
        model,
        output,
        data=data,
        # Which sublayers go is what is chosen.
        fields={"replace": replace.value, "attention": None, "mlp": None, "block": None},
        defaults={"taps": _TAPS} if filters else None,
        options={
            "drop": drop,
            "max_loss": max_loss,
            "speedup": speedup,
            "kinds": tuple(kinds.value.split(",")),
            "budget": None if budget is None else budget.value,
        },
        more=more,
        device=device,
        dtype=dtype.value,
        force=force,
        table="plan_table",
    )

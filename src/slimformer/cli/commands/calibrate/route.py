"""`slimformer calibrate route`: which tokens may skip which sublayers, as trained routers say."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.choice import choose

# Routers are a single linear unit, and learn faster than what other commands train.
_LEARNING_RATE = 5e-3


class Metric(str, Enum):
    """What layers are chosen by."""

    skip_cost = "skip_cost"
    effective_rank = "effective_rank"
    rank = "rank"


class Kinds(str, Enum):
    """What is routed."""

    attention = "attention"
    mlp = "mlp"
    both = "attention,mlp"


def route(
    model: options.Model,
    output: options.Output,
    data: options.Data = None,
    keep: Annotated[float, typer.Option(metavar="X", help="The fraction of tokens computed.")] = 0.5,
    number: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="How many layers. Left out, half of those that may be.",
        ),
    ] = None,
    kinds: Annotated[
        Kinds, typer.Option(metavar="KINDS", help="attention, mlp or attention,mlp.")
    ] = Kinds.attention,
    metric: Annotated[
        Metric,
        typer.Option(metavar="NAME", help="skip_cost, effective_rank or rank chooses the layers."),
    ] = Metric.skip_cost,
    length: Annotated[int, typer.Option(metavar="N", min=16, help="Tokens per row of text.")] = 1024,
    steps: Annotated[int, typer.Option(metavar="N", min=0, help="Updates; 0 only chooses the layers.")] = 400,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    more: options.More = None,
) -> None:
    """Choose layers of MODEL and train routers that let tokens skip them; its own weights stay as they are.

    After Ctrl-C the same command goes on. Several GPUs: under accelerate launch. --set takes
    routing, shared, per, learning_rate, rows, accumulate, precision, texts, seed and text_field.
    """
    training = {"learning_rate": _LEARNING_RATE, **({"steps": steps} if steps else {})}
    choose(
        "MixtureOfDepths",
        model,
        output,
        data=data,
        fields={"keep": keep},
        options={
            "number": number,
            "kinds": tuple(kinds.value.split(",")),
            "metric": metric.value,
            "length": length,
            "train": steps > 0,
        },
        training=training,
        more=more,
        device=device,
        dtype=dtype.value,
        force=force,
        table="router_table",
    )

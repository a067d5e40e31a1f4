"""`slimformer train-predictor`: learn which tokens will matter, and write the plan that eliminates the others."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from slimformer.cli import options, training_options
from slimformer.cli.applicable import refuse_text_field
from slimformer.cli.output import check_output, note, print_json, print_tables
from slimformer.cli.partial import partial_results


def train_predictor(
    ctx: typer.Context,
    model: options.Model,
    output: options.Output,
    schedule: Annotated[
        str,
        typer.Option(
            metavar="LAYER=KEEP,...",
            show_default=False,
            help="From which layers on which fraction of the tokens is computed, such as 10=0.5,15=0.25.",
        ),
    ],
    data: options.Data = None,
    text_field: options.TextField = "text",
    hold_out: training_options.HoldOut = True,
    revivable: Annotated[
        bool, typer.Option("--revivable", help="Every layer chooses afresh, and nothing leaves a cache.")
    ] = False,
    length: Annotated[
        int, typer.Option(min=128, help="Tokens per row: about as many as prompts have.")
    ] = 4096,
    size: Annotated[int, typer.Option(min=1, help="Neurons of a predictor's towers.")] = 256,
    rank: Annotated[
        int, typer.Option(min=1, help="Width of the vectors whose products are the scores.")
    ] = 64,
    steps: training_options.Steps = 400,
    rows: training_options.Rows = 1,
    accumulate: training_options.Accumulate = 1,
    learning_rate: training_options.LearningRate = 1e-3,
    precision: training_options.PrecisionOption = training_options.Precision.no,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Train the predictors of token elimination for MODEL, whose own weights stay as they are.

    Interrupted with Ctrl-C, it keeps a checkpoint: the same command goes on from there. Several GPUs: run it under
    `accelerate launch`.
    """
    layers = _schedule(schedule)
    refuse_text_field(ctx, data)
    check_output(output, force)

    from slimformer.cli.loading import load_model, load_tokenizer
    from slimformer.report import predictor_table
    from slimformer.training.predictors import train_predictors

    settings = training_options.training_settings(steps, rows, accumulate, learning_rate, precision, seed)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, device, dtype.value)
    with partial_results(output) as partial:
        plan = train_predictors(
            loaded,
            tokenizer,
            schedule=layers,
            data=data,
            text_field=text_field,
            hold_out=hold_out,
            length=length,
            size=size,
            rank=rank,
            settings=settings,
            checkpoint=partial,
            progress=True,
            revivable=revivable,
        )
        plan.save_pretrained(output)
    note(f"The plan is in {output}.")
    if as_json:
        print_json(plan.to_dict())
    else:
        print_tables(predictor_table(plan))


def _schedule(given: str) -> dict[int, float]:
    found = {}
    for entry in given.split(","):
        layer, _, keep = entry.partition("=")
        try:
            found[int(layer)] = float(keep)
        except ValueError as error:
            raise typer.BadParameter(
                f"--schedule takes entries such as 15=0.25, separated by commas; got {entry!r}."
            ) from error
    return found

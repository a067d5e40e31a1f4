"""`slimformer bench`: speed and memory beside the dense model."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse
from slimformer.cli.output import print_json, print_tables


def bench(
    ctx: typer.Context,
    model: options.Model,
    plan: options.PlanPath,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens generated.")] = 32,
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Times per median.")] = 5,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    save: options.Save = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what PLAN saves in time and memory, the dense and the patched model taking turns."""
    from slimformer.cli.loading import load_model
    from slimformer.cli.work import keep, plan_folder
    from slimformer.evaluation.readable import predicts_tokens
    from slimformer.evaluation.timing.speed import measure_speed
    from slimformer.model.anatomy import find_anatomy
    from slimformer.plans.plan import Plan
    from slimformer.report import comparison_table

    found = Plan.from_pretrained(plan)
    folder = plan_folder(plan) if save else None
    loaded = load_model(model, device, dtype.value)
    read = f"{prompt_tokens} tokens read"
    if predicts_tokens(loaded, find_anatomy(loaded)):
        read += f", {new_tokens} made"
    else:
        refuse(ctx, {"new_tokens": f"a model that generates, and {type(loaded).__name__} makes embeddings"})
    speed = measure_speed(
        loaded,
        found,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=repeats,
        progress=True,
    )
    measured = {"speed": speed.to_dict()}
    if folder is not None:
        keep(folder, found, measured)
    if as_json:
        print_json(measured["speed"])
    else:
        print_tables(comparison_table(measured, f"{read}, batch {batch_size}"))

"""`slimformer eval` and `slimformer bench`: quality and speed beside the dense model."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse, refuse_text_field
from slimformer.cli.output import print_json, print_tables


def eval_plan(
    ctx: typer.Context,
    model: options.Model,
    plan: options.PlanPath,
    data: options.Data = None,
    text_field: options.TextField = "text",
    blocks: Annotated[
        int | None,
        typer.Option(
            min=1, show_default="16; for an encoder 64", help="Blocks of text, or texts for an encoder."
        ),
    ] = None,
    sequence_length: Annotated[
        int, typer.Option(min=2, help="Tokens per block, at most what the model can read.")
    ] = 512,
    task: options.Task = None,
    seed: Annotated[int, typer.Option(min=0, help="Which blocks of the text are read.")] = 1,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    save: options.Save = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what PLAN costs in quality, on text that calibration has not read."""
    if task is not None:
        without = "text, and --task measures embeddings by a task of its own"
        refuse(ctx, dict.fromkeys(("data", "blocks", "sequence_length", "seed"), without))
    refuse_text_field(ctx, data, task)

    from slimformer.cli.commands.embeddings import measure_task
    from slimformer.cli.loading import load_model, load_tokenizer
    from slimformer.cli.work import evaluate, keep, plan_folder
    from slimformer.plans.plan import Plan
    from slimformer.report import comparison_table

    found = Plan.from_pretrained(plan)
    folder = plan_folder(plan) if save else None
    if task is not None:
        kind, figures = "task", measure_task(model, plan, task, text_field, device, dtype.value)
    else:
        tokenizer = load_tokenizer(model)
        quality, source = evaluate(
            load_model(model, device, dtype.value),
            tokenizer,
            found,
            data=data,
            text_field=text_field,
            blocks=blocks,
            sequence_length=sequence_length,
            seed=seed,
        )
        kind, figures = "quality", {**quality, "data": source}
    if folder is not None:
        keep(folder, found, {kind: figures})
    if as_json:
        print_json(figures)
    else:
        print_tables(comparison_table({kind: figures}, f"quality on {figures['data']}"))


def bench(
    ctx: typer.Context,
    model: options.Model,
    plan: options.PlanPath,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens generated.")] = 32,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    repeats: Annotated[int, typer.Option(min=1, help="Times per median.")] = 5,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    save: options.Save = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what PLAN saves in time and memory, the dense and the patched model taking turns."""
    from slimformer.calibration.drops.calibration_text import predicts_tokens
    from slimformer.cli.loading import load_model
    from slimformer.cli.work import keep, plan_folder
    from slimformer.evaluation.timing.speed import measure_speed
    from slimformer.model.anatomy import find_anatomy
    from slimformer.plans.plan import Plan
    from slimformer.report import comparison_table

    found = Plan.from_pretrained(plan)
    folder = plan_folder(plan) if save else None
    loaded = load_model(model, device, dtype.value)
    if not predicts_tokens(loaded, find_anatomy(loaded)):
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
        print_tables(
            comparison_table(measured, f"{prompt_tokens} tokens read, {new_tokens} made, batch {batch_size}")
        )

"""`slimformer eval`: quality beside the dense model."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import logging
from typing import Annotated, Any

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse, refuse_text_field
from slimformer.cli.output import print_json, print_tables

_logger = logging.getLogger("slimformer")


def eval_plan(
    ctx: typer.Context,
    model: options.Model,
    plan: options.PlanPath,
    data: options.Data = None,
    text_field: options.TextField = "text",
    blocks: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default="16; for an encoder 64",
            help="Blocks of text, or texts for an encoder.",
        ),
    ] = None,
    sequence_length: Annotated[
        int, typer.Option(metavar="N", min=2, help="Tokens per block, at most what the model can read.")
    ] = 512,
    task: options.Task = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Which blocks of the text are read.")] = 1,
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

    from slimformer.cli.loading import load_model, load_tokenizer
    from slimformer.cli.work import evaluate, keep, plan_folder
    from slimformer.plans.plan import Plan
    from slimformer.report import comparison_table

    found = Plan.from_pretrained(plan)
    folder = plan_folder(plan) if save else None
    if task is not None:
        kind, figures = "task", _measure_task(model, plan, task, text_field, device, dtype.value)
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


def _measure_task(
    model: str, plan: str, source: str, text_field: str, device: str, dtype: str
) -> dict[str, Any]:
    """With --task: every figure of the dense pipeline and of the patched one.

    Where the plan was chosen by the same task, only the part that was held out then is measured.

    Raises:
        DataError: If the task cannot be read.
    """
    import rich

    import slimformer
    from slimformer.cli.loading import load_embedder
    from slimformer.evaluation.embedding_tasks import EmbeddingTask, read_task
    from slimformer.plans.plan import Plan

    found = Plan.from_pretrained(plan)
    task: EmbeddingTask = read_task(source, text_field=text_field)
    arguments = found.provenance.get("arguments")
    said = arguments if isinstance(arguments, dict) else {}
    # Plans of version 0.1.0 call it the objective.
    chosen_by = str(said.get("task") or said.get("objective") or found.provenance.get("data"))
    if chosen_by == task.source:
        _logger.warning(
            "The plan was chosen by all of this task, so its quality is overestimated: measure by another."
        )
    elif chosen_by.startswith(task.source):
        task = task.split()[1]
    loaded = load_embedder(model, device, dtype)
    with rich.get_console().status("measuring embeddings"):
        task = task.recorded(loaded)
        dense = task.figures(loaded)
        with slimformer.patched(loaded, found):
            slim = task.figures(loaded)
    return {"data": task.source, "dense": dense, "slim": slim}

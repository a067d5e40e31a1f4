"""What the commands do with an embedding pipeline: choose an exit, and measure a plan by a task."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from slimformer.cli.output import note, print_json, print_tables
from slimformer.cli.partial import partial_results

_logger = logging.getLogger("slimformer")


def calibrate_exits(
    model: str,
    output: Path,
    data: str | None,
    text_field: str,
    layer: int | None,
    max_loss: float | None,
    head: bool,
    hold_out: bool,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """`slimformer calibrate --method elastic`: the grid, its page, and the plan of one exit."""
    from slimformer.calibration.elastic import calibrate_elastic
    from slimformer.cli.loading import load_embedder
    from slimformer.evaluation.embedding_tasks import read_task
    from slimformer.report import grid_table

    task = read_task(data, text_field=text_field)
    with partial_results(output) as partial:
        plan = calibrate_elastic(
            load_embedder(model, device, dtype),
            task,
            layer=layer,
            max_loss=max_loss,
            head=head,
            hold_out=hold_out,
            checkpoint=partial,
            progress=True,
        )
        plan.save_pretrained(output)
    note(f"The plan is in {output}. slimformer show {output} --html plan.html draws the grid.")
    if as_json:
        print_json(plan.to_dict())
    else:
        table = grid_table(plan)
        print_tables(*([] if table is None else [table]))


def narrow_mlps(
    model: str,
    output: Path,
    data: str | None,
    text_field: str,
    keep: float | None,
    max_loss: float | None,
    hold_out: bool,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """`slimformer calibrate --method narrow`: the plan of narrow MLPs, and what each width was worth."""
    from slimformer.calibration.narrow_mlps import calibrate_narrow
    from slimformer.cli.loading import load_embedder
    from slimformer.evaluation.embedding_tasks import read_task
    from slimformer.report import narrow_table

    task = read_task(data, text_field=text_field)
    plan = calibrate_narrow(
        load_embedder(model, device, dtype),
        task,
        keep=keep,
        max_loss=max_loss,
        hold_out=hold_out,
        progress=True,
    )
    plan.save_pretrained(output)
    note(
        f"The plan is in {output}. slimformer eval {model} --plan {output} --task ... measures what was held out."
    )
    if as_json:
        print_json(plan.to_dict())
    else:
        table = narrow_table(plan)
        print_tables(*([] if table is None else [table]))


def sweep_temperatures(
    model: str,
    output: Path,
    data: str | None,
    text_field: str,
    hold_out: bool,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """`slimformer calibrate --method temperature`: the curve, its page, and the plan of the best temperature."""
    from slimformer.calibration.temperature import calibrate_temperature
    from slimformer.cli.loading import load_embedder
    from slimformer.evaluation.embedding_tasks import read_task
    from slimformer.report import temperature_table

    task = read_task(data, text_field=text_field)
    plan = calibrate_temperature(load_embedder(model, device, dtype), task, hold_out=hold_out, progress=True)
    plan.save_pretrained(output)
    note(f"The plan is in {output}. slimformer show {output} --html plan.html draws the curve.")
    if as_json:
        print_json(plan.to_dict())
    else:
        table = temperature_table(plan)
        print_tables(*([] if table is None else [table]))


def measure_task(
    model: str, plan: str, source: str, text_field: str, device: str, dtype: str
) -> dict[str, Any]:
    """`slimformer eval --task`: every figure of the dense pipeline and of the patched one.

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
    chosen_by = str(
        (arguments.get("objective") if isinstance(arguments, dict) else None) or found.provenance.get("data")
    )
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

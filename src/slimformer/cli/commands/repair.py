"""`slimformer repair`: train the little that a plan leaves open, and write the repaired plan."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import dataclasses
import inspect
from typing import Annotated, Any

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse_settings_without_data
from slimformer.cli.output import check_output, leave_where_nothing_was_won, note, print_tables
from slimformer.cli.partial import partial_results
from slimformer.cli.settings import Settings


def repair(
    model: options.Model,
    plan: options.PlanPath,
    output: options.Output,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            show_default=False,
            help="Text, own-words, built-in or copying; several as SOURCE=WEIGHT. Left out, the three.",
        ),
    ] = None,
    what: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="Some of added (the plan's filters, means, heads), norms (and biases), lora (merged when done).",
        ),
    ] = "added,norms,lora",
    rounds: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="Drop in so many rounds, repairing after each."),
    ] = 1,
    length: options.Length = 1024,
    minutes: Annotated[
        float, typer.Option(metavar="N", min=0, help="How long in all; 0 is as long as the steps take.")
    ] = 10.0,
    steps: Annotated[int, typer.Option(metavar="N", min=1, help="Most updates per round.")] = 2000,
    precision: options.PrecisionOption = options.Precision.auto,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    more: options.More = None,
) -> None:
    """Win back what MODEL loses under PLAN: its dense self teaches it, for minutes.

    The checkpoint stays as it is; what is learnt goes into the plan. Where nothing is won, the plan
    stays as it was, and the exit code is 4. After Ctrl-C the same command goes on. Several GPUs: under
    accelerate launch. --set takes near (layers that norms and lora reach), rank, rows, learning_rate,
    gradient_checkpointing, panel, cache, every, patience, seed, text_field and others.
    """
    parts: Any = tuple(part.strip() for part in what.split(","))
    settings = Settings(more)
    for name, needed in (("rank", {"lora"}), ("near", {"lora", "norms"})):
        if name in settings.left and not needed & set(parts):
            raise typer.BadParameter(
                f"--set {name}=... goes with --what {' or '.join(sorted(needed)[::-1])}."
            )
    refuse_settings_without_data(settings, data[0] if data else None)
    check_output(output, force)

    import slimformer
    from slimformer.calibration.mixture.sources import weighted
    from slimformer.cli.loading import load_for_plan
    from slimformer.plans.plan import Plan
    from slimformer.report import repair_table
    from slimformer.training.loop import TrainingSettings
    from slimformer.training.repair import usual_settings

    own = {"data", "what", "rounds", "length", "minutes", "settings", "checkpoint", "progress"}
    parameters = inspect.signature(slimformer.repair).parameters.values()
    given = settings.take(
        slimformer.repair, [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in own]
    )
    training: dict[str, Any] = {"steps": steps, "precision": precision.value}
    fields = [f.name for f in dataclasses.fields(TrainingSettings) if f.name not in ("steps", "precision")]
    training |= settings.take(TrainingSettings, fields)
    settings.check_none_left("repair")
    read = weighted(data or [])
    found = Plan.from_pretrained(plan)
    loaded, tokenizer = load_for_plan(model, device, dtype.value)
    with partial_results(output) as partial:
        repaired = slimformer.repair(
            loaded,
            found,
            tokenizer,
            data=read,
            what=parts,
            rounds=rounds,
            length=length,
            minutes=minutes or None,
            settings=dataclasses.replace(usual_settings(loaded), **training),
            checkpoint=partial,
            progress=True,
            **given,
        )
        repaired.save_pretrained(output)
    note(f"The plan is in {output}.")
    print_tables(repair_table(repaired))
    leave_where_nothing_was_won(repaired.measured, "repair")

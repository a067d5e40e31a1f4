"""`slimformer repair`: train the little that a plan leaves open, and write the repaired plan."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated, Any

import typer

from slimformer.cli import options, training_options
from slimformer.cli.applicable import refuse, refuse_text_field
from slimformer.cli.output import check_output, note, print_json, print_tables
from slimformer.cli.partial import partial_results


def repair(
    ctx: typer.Context,
    model: options.Model,
    plan: options.PlanPath,
    output: options.Output,
    data: options.Data = None,
    text_field: options.TextField = "text",
    hold_out: training_options.HoldOut = True,
    what: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="What is trained, separated by commas: added (filters, means and heads of the plan), norms (with "
            "biases), lora (low-rank changes of linear layers, merged when done).",
        ),
    ] = "added,norms,lora",
    near: Annotated[
        int,
        typer.Option(min=-1, help="Norms and lora: so many layers around each change; -1 for all layers."),
    ] = 2,
    rank: Annotated[int, typer.Option(min=1, help="Of the low-rank changes.")] = 16,
    hidden: Annotated[
        float,
        typer.Option(min=0, help="How much the residual behind changed layers counts beside the outputs."),
    ] = 0.0,
    rounds: Annotated[
        int, typer.Option(min=1, help="Drop the plan's sublayers in so many rounds, repairing after each.")
    ] = 1,
    length: training_options.Length = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Updates per round.")] = 400,
    rows: training_options.Rows = 4,
    accumulate: training_options.Accumulate = 1,
    learning_rate: training_options.LearningRate = 1e-3,
    every: Annotated[int, typer.Option(min=1, help="Steps between measurements on held-out text.")] = 25,
    patience: Annotated[
        int, typer.Option(min=1, help="So many measurements without a better one end a round.")
    ] = 4,
    precision: training_options.PrecisionOption = training_options.Precision.no,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Win back what MODEL loses under PLAN: its dense self teaches it on your text, for minutes.

    MODEL's checkpoint stays as it is; what is learnt goes into the plan. Interrupted with Ctrl-C, it keeps a
    checkpoint: the same command goes on from there. Several GPUs: run it under `accelerate launch`.
    """
    parts: Any = tuple(part.strip() for part in what.split(","))
    if "lora" not in parts:
        refuse(ctx, {"rank": "--what lora"})
    if not {"lora", "norms"} & set(parts):
        refuse(ctx, {"near": "--what norms or lora"})
    refuse_text_field(ctx, data)
    check_output(output, force)

    import slimformer
    from slimformer.cli.loading import load_for_plan
    from slimformer.plans.plan import Plan
    from slimformer.report import repair_table

    settings = training_options.training_settings(steps, rows, accumulate, learning_rate, precision, seed)
    given = Plan.from_pretrained(plan)
    loaded, tokenizer = load_for_plan(model, device, dtype.value)
    with partial_results(output) as partial:
        repaired = slimformer.repair(
            loaded,
            given,
            tokenizer,
            data=data,
            text_field=text_field,
            hold_out=hold_out,
            what=parts,
            near=None if near < 0 else near,
            rank=rank,
            hidden=hidden,
            length=length,
            rounds=rounds,
            every=every,
            patience=patience,
            settings=settings,
            checkpoint=partial,
            progress=True,
        )
        repaired.save_pretrained(output)
    note(f"The plan is in {output}.")
    if as_json:
        print_json(repaired.to_dict())
    else:
        print_tables(repair_table(repaired))

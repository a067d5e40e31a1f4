"""`slimformer repair`: train the little that a plan leaves open, and write the repaired plan."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from typing import Annotated, Any

import typer

from slimformer.cli import options
from slimformer.cli.output import check_output, note, print_json, print_tables
from slimformer.cli.partial import partial_results
from slimformer.cli.train_predictor import Precision


def repair(
    model: options.Model,
    plan: options.PlanPath,
    output: options.Output,
    data: options.Data = None,
    text_field: options.TextField = "text",
    hold_out: Annotated[
        bool, typer.Option(help="Measure on every fifth text, which is not trained on.")
    ] = True,
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
    length: Annotated[int, typer.Option(min=16, help="Tokens per row.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Updates per round.")] = 400,
    rows: Annotated[int, typer.Option(min=1, help="Rows of text at a time.")] = 4,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches per update.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Its peak.")] = 1e-3,
    every: Annotated[int, typer.Option(min=1, help="Steps between measurements on held-out text.")] = 25,
    patience: Annotated[
        int, typer.Option(min=1, help="So many measurements without a better one end a round.")
    ] = 4,
    precision: Annotated[Precision, typer.Option(help="Mixed precision of both passes.")] = Precision.no,
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
    check_output(output, force)

    import slimformer
    from slimformer.cli.loading import load_for_plan
    from slimformer.plan import Plan
    from slimformer.report import repair_table
    from slimformer.training.loop import TrainingSettings

    settings = TrainingSettings(
        steps=steps,
        rows=rows,
        accumulate=accumulate,
        learning_rate=learning_rate,
        precision=precision.value,
        seed=seed,
    )
    given = Plan.from_pretrained(plan)
    loaded, tokenizer = load_for_plan(model, device, dtype.value)
    parts: Any = tuple(part.strip() for part in what.split(","))
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

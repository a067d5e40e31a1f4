"""`slimformer eval`: quality beside the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse, refuse_text_field
from slimformer.cli.judging import Judging, listed


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
    panel: Annotated[
        bool, typer.Option("--panel/--no-panel", help="Also judge every capability beside the dense model.")
    ] = True,
    budget: options.PanelSize = options.PanelBudget.standard,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS,...",
            show_default=False,
            help="Lengths of the prompts in which a key is looked for.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Your own prompts: .jsonl with prompt and answer, or .txt with prompts between blank lines.",
        ),
    ] = None,
    prompts_by: Annotated[
        options.JudgedBy,
        typer.Option(help="How they are judged: the answer's likelihood, or an exact match."),
    ] = options.JudgedBy.likelihood,
    words: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            show_default="beside the checkpoint",
            help="Where what the dense model writes is kept for the next time.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            show_default=False,
            help="Tasks of lm-evaluation-harness (the extra eval), or of mteb for embeddings, such as hellaswag,gsm8k.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default="all", help="Questions per task of --tasks."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Which blocks of the text are read.")] = 1,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    save: options.Save = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what PLAN costs in quality: by a panel of capabilities, on text that calibration has not read."""
    if task is not None:
        without = "text, and --task measures embeddings by a task of its own"
        unused = ("data", "blocks", "sequence_length", *(() if panel else ("seed",)))
        refuse(ctx, dict.fromkeys(unused, without))
    refuse_text_field(ctx, data, task)
    if not panel:
        refuse(ctx, dict.fromkeys(("budget", "lengths", "prompts", "prompts_by", "words"), "the panel"))
    if prompts is None:
        refuse(ctx, {"prompts_by": "a file of --prompts"})
    if tasks is None:
        refuse(ctx, {"limit": "--tasks"})

    names = None if tasks is None else listed(tasks, "--tasks", str)
    judging = Judging(
        model,
        plan,
        data=data,
        text_field=text_field,
        seed=seed,
        device=device,
        dtype=dtype.value,
        budget=budget.value,
        lengths=None if lengths is None else listed(lengths, "--lengths", int),
        prompts=prompts,
        prompts_by=prompts_by.value,
        words=words,
    )
    judging.check(save)
    if task is not None:
        measured = {"task": judging.task(task)}
    else:
        measured = {"quality": judging.quality(blocks, sequence_length)}
    judging.keep(measured, save)
    if panel:
        measured["panel"] = judging.panel(task)
        judging.keep(measured, save)
    if names is not None:
        measured["tasks"] = judging.tasks(names, limit)
        judging.keep(measured, save)
    judging.show(measured, as_json)

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
            show_default=False,
            help="Blocks of text, 16 unless said; for an encoder texts, 64.",
        ),
    ] = None,
    sequence_length: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens per block at most.")] = 512,
    task: options.Task = None,
    panel: Annotated[
        options.PanelBudget,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="Capabilities: none, quick, standard (default), thorough.",
        ),
    ] = options.PanelBudget.standard,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="N,...", show_default=False, help="Tokens of prompts that hide a key."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, help="Your prompts: .jsonl (prompt, answer) or .txt."
        ),
    ] = None,
    prompts_by: Annotated[
        options.JudgedBy,
        typer.Option(metavar="NAME", show_default=False, help="By likelihood (unless said) or by match."),
    ] = options.JudgedBy.likelihood,
    words: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            show_default=False,
            help="Where dense's answers are kept; else in MODEL's folder.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B", show_default=False, help="Of lm-evaluation-harness; of mteb for embeddings."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Questions of each of the tasks."),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Which blocks of the text are read.")] = 1,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    save: options.Save = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what PLAN costs in quality: capabilities, and text that calibration has not read."""
    if task is not None:
        without = "text, and --task measures embeddings by a task of its own"
        unused = (
            "data",
            "blocks",
            "sequence_length",
            *(("seed",) if panel is options.PanelBudget.none else ()),
        )
        refuse(ctx, dict.fromkeys(unused, without))
    refuse_text_field(ctx, data, task)
    if panel is options.PanelBudget.none:
        refuse(ctx, dict.fromkeys(("lengths", "prompts", "prompts_by", "words"), "the panel"))
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
        budget=panel.value,
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
    if panel is not options.PanelBudget.none:
        measured["panel"] = judging.panel(task)
        judging.keep(measured, save)
    if names is not None:
        measured["tasks"] = judging.tasks(names, limit)
        judging.keep(measured, save)
    judging.show(measured, as_json)

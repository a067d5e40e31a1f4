"""`slimformer optimize`: the fastest plan within a loss, its page and the curve that it was chosen from."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import contextlib
import functools
from enum import Enum
from typing import Annotated, Any

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse_settings_without_data
from slimformer.cli.output import check_output, leave_where_nothing_was_won
from slimformer.cli.partial import partial_results
from slimformer.cli.settings import Settings

_LOCAL = "local"
_SET = ("prompts", "prompts_by", "new_tokens", "repair", "hold_out", "text_field", "seed")


class Goal(str, Enum):
    """What is to cost less."""

    prefill = "prefill"
    generate = "generate"
    # A string has a method of the name `encode`.
    encoding = "encode"
    memory = "memory"


def optimize(
    model: options.Model,
    output: options.Output,
    goal: Annotated[
        Goal,
        typer.Option(
            "--for",
            metavar="GOAL",
            show_default=False,
            help="What is to cost less: prefill, generate, encode or memory.",
        ),
    ],
    max_loss: Annotated[
        str | None,
        typer.Option(
            metavar="X",
            show_default="2%",
            help="The most that may be lost on average, 2% or 0.02; of each capability it may be twice that.",
        ),
    ] = None,
    speedup: Annotated[
        float | None,
        typer.Option(metavar="X", show_default=False, help="Instead: the least loss at so many times dense."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            show_default=False,
            help="Text, several as SOURCE=WEIGHT; for embeddings also a BEIR folder or a .tsv file of pairs.",
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            show_default=False,
            help="Tokens of a prompt. Left out, what suits the device.",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, show_default="1; 32 texts", help="Prompts, or texts of embeddings, at once."
        ),
    ] = None,
    minutes: Annotated[float, typer.Option(metavar="N", help="How long it may take.")] = 15.0,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            show_default=False,
            help="Judge on several workers by Ray: of a cluster, or local.",
        ),
    ] = None,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    more: options.More = None,
) -> None:
    """Find the fastest plan for MODEL within a loss, of all that can be left out together, and write it and its page.

    Where nothing is faster within the loss, the plan changes nothing, and the exit code is 4; the page shows what was
    tried. After Ctrl-C the same command goes on. --set takes prompts (a file of your own, which then decide),
    prompts_by, new_tokens, repair, hold_out, text_field and seed; with --ray, workers and threads.
    """
    if max_loss is not None and speedup is not None:
        raise typer.BadParameter("Give either --max-loss or --speedup, not both.")
    loss = None if max_loss is None else fraction(max_loss)
    settings = Settings(more)
    refuse_settings_without_data(settings, data[0] if data else None)
    check_output(output, force)

    import slimformer
    from slimformer.calibration.mixture.sources import weighted
    from slimformer.cli.loading import load_for_plan
    from slimformer.cli.optimized import print_uses, show_optimized
    from slimformer.evaluation.embedding_tasks import is_labelled, read_task

    own = settings.take(slimformer.optimize, _SET)
    judging: Any = contextlib.nullcontext()
    if ray is not None:
        judging = _on_ray(ray, model, dtype.value, settings)
    settings.check_none_left("optimize")
    read = weighted(data or [])
    if goal is Goal.encoding and is_labelled(read):
        # What embeddings are for is read before the model is.
        read = read_task(read)
    with judging as judges, partial_results(output) as partial:
        loaded, tokenizer = load_for_plan(model, device, dtype.value)
        plan = slimformer.optimize(
            loaded,
            tokenizer,
            goal=goal.value,
            max_loss=loss,
            speedup=speedup,
            data=read,
            prompt=prompt,
            batch=batch,
            minutes=minutes,
            judges=judges,
            checkpoint=partial,
            progress=True,
            **own,
        )
        plan.save_pretrained(output)
    show_optimized(plan, output)
    leave_where_nothing_was_won(plan.measured, "optimize")
    print_uses(plan, model, output)


def _on_ray(address: str, model: str, dtype: str, settings: Settings) -> Any:
    """Judges that load the same model."""
    from slimformer.integrations.ray import RayJudges
    from slimformer.integrations.ray.cluster import from_anywhere

    own = settings.take(RayJudges.__init__, ("workers", "threads"))
    load = functools.partial(_loaded, from_anywhere(model), dtype)
    return RayJudges(load, address=None if address == _LOCAL else address, **own)


def _loaded(name: str, dtype: str, device: str) -> Any:
    from slimformer.cli.loading import load_for_plan

    return load_for_plan(name, device, dtype)[0]


def fraction(text: str) -> float:
    """A percentage or a fraction as it is typed.

    Raises:
        typer.BadParameter: If it is neither, or not from 0 to below 1.

    Example:
        >>> fraction("2%"), fraction("0.5 %"), fraction("0.02")
        (0.02, 0.005, 0.02)
    """
    written, percent, behind = text.strip().partition("%")
    try:
        value = float(written) / (100 if percent else 1)
    except ValueError:
        value = -1.0
    if behind or not 0 <= value < 1:
        raise typer.BadParameter(
            f"--max-loss takes a percentage such as 2% or a fraction such as 0.02, got {text!r}."
        )
    return value

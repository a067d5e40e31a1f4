"""`slimformer generate`: continue a prompt with a patched model."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import sys
from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse


def generate(
    ctx: typer.Context,
    model: options.Model,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", show_default=False, help="Text, or - for standard input.")
    ],
    plan: Annotated[
        str | None,
        typer.Option(
            metavar="PLAN",
            show_default=False,
            help="A plan's folder, file or Hub id; left out, the dense model.",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(metavar="X", min=0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    chat: Annotated[
        bool, typer.Option(help="Put the prompt into the model's chat template, where it has one.")
    ] = True,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
) -> None:
    """Continue PROMPT and print the text as it comes."""
    if temperature == 0:
        refuse(ctx, {"seed": "a --temperature above 0: the likeliest token is no matter of chance"})
    text = sys.stdin.read() if prompt == "-" else prompt

    from transformers import set_seed

    import slimformer
    from slimformer.cli.loading import load_model, load_tokenizer
    from slimformer.cli.work import generate_text
    from slimformer.plans.plan import Plan

    found = None if plan is None else Plan.from_pretrained(plan)
    tokenizer = load_tokenizer(model)
    loaded = load_model(model, device, dtype.value)
    if found is not None:
        slimformer.patch(loaded, found)
    set_seed(seed)
    generate_text(
        loaded,
        tokenizer,
        text,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        chat=chat,
        stream=True,
    )

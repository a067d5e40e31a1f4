"""`slimformer demo`: what loses nothing, and then the fastest plan within a loss, on a small model or one of yours."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import dataclasses
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse_text_field
from slimformer.cli.commands.optimize import Goal, fraction
from slimformer.cli.output import check_output, note, print_json, print_tables

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimformer.evaluation.timing.arrivals import Arrivals
    from slimformer.evaluation.timing.padded_prompts import PaddedPrompts

# Paragraphs that are embedded, tokens of the longest prompt in a batch, and of one that is optimised for on a CPU.
_ARRIVALS, _BATCHED, _PROMPT = 96, 128, 256
_EMBEDDER = "all-MiniLM-L6-v2"


def demo(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A folder or Hub id. Left out, SmolLM2-135M-Instruct and, for embeddings, all-MiniLM-L6-v2, fetched "
            "the first time; without a connection, a tiny model that is trained here in half a minute.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the plan and its page go.")
    ] = Path("demo-output"),
    goal: Annotated[
        Goal | None,
        typer.Option(
            "--for",
            metavar="GOAL",
            show_default="prefill; of embedding models encode",
            help="What is to cost less.",
        ),
    ] = None,
    max_loss: Annotated[str, typer.Option(metavar="X", help="The most that may be lost on average.")] = "5%",
    minutes: Annotated[float, typer.Option(metavar="N", help="How long the search may take.")] = 2.0,
    data: options.Data = None,
    text_field: options.TextField = "text",
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Show what the patch alone gains, which loses nothing; then find the fastest plan within a loss, and its page."""
    if data == "-":
        raise typer.BadParameter("The demo reads its text twice, so --data takes a file or a dataset, not -.")
    refuse_text_field(ctx, data)
    loss = fraction(max_loss)
    check_output(output, force)
    started = time.monotonic()

    def step(number: int, text: str) -> None:
        note(f"\n[{number}/2, after {time.monotonic() - started:.0f} s] {text}")

    import slimformer
    from slimformer.cli.optimized import print_uses, show_optimized
    from slimformer.text.sources import load_texts

    texts, source = load_texts(data, text_field=text_field)
    step(1, "What loses nothing: slimformer.patch(model), timed in turns with the model as it is")
    name, loaded, tokenizer = _model(model, device, dtype.value)
    document: dict[str, Any] = {}
    tables = []
    embedder = loaded if hasattr(loaded, "encode") else None
    if embedder is None and model is None:
        embedder = _embedder(device, dtype.value)
    if embedder is not None:
        arrivals = _embed(embedder, texts, seed)
        document["embedding"] = {**dataclasses.asdict(arrivals), "speedup": arrivals.speedup, "data": source}
        tables.append(_arrivals_table(arrivals, name if embedder is loaded else _EMBEDDER))
    decoder = embedder is not loaded
    if decoder:
        batch = _batch(loaded, tokenizer, texts, seed)
        document["batch"] = {**dataclasses.asdict(batch), "speedup": batch.speedup, "data": source}
        tables.append(_batch_table(batch, name))
    if not as_json:
        print_tables(*tables)
    wanted: Any = (goal or (Goal.prefill if decoder else Goal.encoding)).value
    step(2, f"slimformer optimize {name} --for {wanted} --max-loss {max_loss} --minutes {minutes:g}")
    plan = slimformer.optimize(
        loaded,
        tokenizer,
        goal=wanted,
        max_loss=loss,
        data=data,
        text_field=text_field,
        prompt=_prompt(loaded, tokenizer) if decoder else None,
        minutes=minutes,
        seed=seed,
        progress=True,
    )
    plan.save_pretrained(output)
    if as_json:
        print_json({**document, "plan": plan.to_dict()})
    else:
        show_optimized(plan, output, front=True)
        if plan.measured["optimize"]["won"]:
            print_uses(plan, name, output)
    note(f"Done in {time.monotonic() - started:.0f} s.")


def _model(model: str | None, device: str, dtype: str) -> tuple[str, Any, PreTrainedTokenizerBase]:
    """A name or folder, the model, and its tokenizer."""
    from slimformer.cli.commands.demo_models import demo_model, trained_model
    from slimformer.cli.loading import load_for_plan
    from slimformer.errors import SlimformerError

    if model is None:
        try:
            model = str(demo_model())
        except SlimformerError as error:
            note(f"{error}\nA tiny model stands in for it, which is trained here the first time ...")
            model = str(trained_model())
    return (model, *load_for_plan(model, device, dtype))


def _embedder(device: str, dtype: str) -> Any:
    """The demo's pipeline; None where it cannot be fetched."""
    from slimformer.cli.commands.demo_models import demo_embedder
    from slimformer.cli.loading import load_embedder
    from slimformer.errors import SlimformerError

    try:
        return load_embedder(str(demo_embedder()), device, dtype)
    except SlimformerError as error:
        note(f"Nothing is embedded: {error}")
        return None


def _embed(embedder: Any, texts: list[str], seed: int) -> Arrivals:
    from slimformer.evaluation.timing.arrivals import measure_arrivals

    paragraphs = [part.strip() for text in texts for part in text.split("\n\n") if part.strip()]
    random.Random(seed).shuffle(paragraphs)
    return measure_arrivals(embedder, paragraphs[:_ARRIVALS])


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], seed: int
) -> PaddedPrompts:
    from slimformer.evaluation.readable import longest
    from slimformer.evaluation.timing.padded_prompts import measure_padded_prompts
    from slimformer.examination.tiers import known_anatomy

    room = longest(known_anatomy(model), tokenizer)
    return measure_padded_prompts(model, tokenizer, texts=texts, longest=min(_BATCHED, room), seed=seed)


def _prompt(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens of a prompt that a CPU reads often enough in the time; None for what is usual."""
    from slimformer.evaluation.readable import longest
    from slimformer.examination.tiers import known_anatomy

    if model.device.type != "cpu":
        return None
    # Of shorter ones there is room for what is generated behind them.
    return min(_PROMPT, max(longest(known_anatomy(model), tokenizer) * 3 // 4, 1))


def _patch_table(title: str) -> Table:
    """A table with a column for the patch alone, which loses nothing."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for name in ("unpatched", "slimformer.patch(model)", "change"):
        table.add_column(name, justify="right")
    return table


def _arrivals_table(arrivals: Arrivals, name: str) -> Table:
    table = _patch_table(
        f"{arrivals.texts} paragraphs in batches of {arrivals.batch_size}, in arrival order, {Path(name).name}"
    )
    table.add_row(
        "Texts per second",
        f"{arrivals.dense_per_second:.1f}",
        f"{arrivals.patched_per_second:.1f}",
        f"{arrivals.speedup:.2f}× as fast",
    )
    table.add_row("Lowest cosine", "1", f"{arrivals.lowest_cosine:.6f}", "")
    return table


def _batch_table(batch: PaddedPrompts, name: str) -> Table:
    from slimformer.report.summary import seconds

    table = _patch_table(
        f"{batch.prompts} prompts of {batch.longest // batch.prompts} to {batch.longest} tokens in one batch, "
        f"{Path(name).name}"
    )
    table.add_row(
        "First tokens",
        seconds(batch.dense_seconds),
        seconds(batch.patched_seconds),
        f"{batch.speedup:.2f}× as fast",
    )
    table.add_row("Difference of logits, by rounding", "0", f"{batch.difference:.1e}", "")
    return table

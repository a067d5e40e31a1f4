"""`slimformer demo`: what is gained on real models, an embedding corpus and long prompts, with quality beside speed."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

import dataclasses
import math
import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slimformer.cli import options
from slimformer.cli.applicable import refuse_text_field
from slimformer.cli.output import check_output, note, print_json, print_tables, write_text

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from slimformer import Plan
    from slimformer.evaluation.timing.arrivals import Arrivals
    from slimformer.evaluation.timing.long_prompts import LongPromptComparison
    from slimformer.evaluation.timing.padded_prompts import PaddedPrompts

# Paragraphs that are embedded, the tokens of an answer, and those of the longest prompt in a batch.
_ARRIVALS, _ANSWER, _BATCHED = 192, 64, 512
# From two thirds of the layers on a fifth of the tokens, in blocks. Of five settings tried on the Python reference it
# is the one that lost least (8.8% of perplexity) among those that kept the facts, three prompts of either kind.
_FROM, _KEEP, _BLOCK = 2 / 3, 0.2, 128
_SHORTEST = 256
_CHOSEN = "by hand, of five settings tried with SmolLM2-135M-Instruct on prompts of the Python reference"


def demo(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            show_default=False,
            help="A decoder's folder or Hub id; with it, nothing is embedded. Left out, SmolLM2-135M-Instruct, and "
            "all-MiniLM-L6-v2 for the embeddings, fetched the first time.",
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where the plan and its page go.")
    ] = Path("demo-output"),
    data: options.Data = None,
    text_field: options.TextField = "text",
    prompt: Annotated[
        int,
        typer.Option(metavar="N", min=64, help="Tokens of a prompt; fewer where the model reads no more."),
    ] = 2048,
    prompts: Annotated[
        int,
        typer.Option(metavar="N", min=1, help="How many prompts ask for a fact, and how many just go on."),
    ] = 3,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dtype: options.DtypeOption = options.Dtype.auto,
    force: options.Force = False,
    as_json: options.AsJson = False,
) -> None:
    """Embed texts as they arrive and read long prompts, unpatched and patched in turns; write a plan and its page."""
    if data == "-":
        raise typer.BadParameter("The demo reads its text twice, so --data takes a file or a dataset, not -.")
    refuse_text_field(ctx, data)
    check_output(output, force)
    started = time.monotonic()
    steps = 3 if model is None else 2

    def step(number: int, text: str) -> None:
        note(f"[{number}/{steps} after {time.monotonic() - started:.0f} s] {text}")

    from slimformer.text.sources import load_texts

    texts, source = load_texts(data, text_field=text_field)
    document: dict[str, Any] = {}
    tables = []
    if model is None:
        step(1, "embedding: all-MiniLM-L6-v2 (fetched the first time), unpatched and patched in turns")
        arrivals = _embed(texts, seed, device, dtype.value)
        document["embedding"] = {**dataclasses.asdict(arrivals), "speedup": arrivals.speedup, "data": source}
        tables.append(_arrivals_table(arrivals))
    step(
        steps - 1,
        f"a batch of prompts: {model or 'SmolLM2-135M-Instruct (fetched the first time)'}, the same way",
    )
    name, loaded, tokenizer = _decoder(model, device, dtype.value)
    batch = _batch(loaded, tokenizer, texts, seed)
    document["batch"] = {**dataclasses.asdict(batch), "speedup": batch.speedup, "data": source}
    tables.append(_batch_table(batch, name))
    step(steps, "long prompts, with a plan that leaves out tokens")
    plan, page = _read(loaded, tokenizer, texts, source, output, prompt, prompts, seed)
    document |= {"plan": plan.to_dict(), "page": str(page)}
    if as_json:
        print_json(document)
    else:
        from slimformer.report import comparison_table
        from slimformer.report.tables import method_rows

        settings = ", ".join(f"{name}: {words}" for name, words in method_rows(plan))
        length = plan.measured["speed"]["prompt_tokens"]
        told = plan.measured["quality"]
        table = comparison_table(plan.measured, f"Prompts of {length} tokens, {settings}")
        table.add_row("Facts recalled", told["facts_recalled_dense"], told["facts_recalled_slim"], "")
        tables.append(table)
        print_tables(*tables)
    note(f"Done in {time.monotonic() - started:.0f} s. Plan: {output}, page: {page}")


def _embed(texts: list[str], seed: int, device: str, dtype: str) -> Arrivals:
    from slimformer.cli.commands.demo_models import demo_embedder
    from slimformer.cli.loading import load_embedder
    from slimformer.evaluation.timing.arrivals import measure_arrivals

    paragraphs = [part.strip() for text in texts for part in text.split("\n\n") if part.strip()]
    random.Random(seed).shuffle(paragraphs)
    embedder = load_embedder(str(demo_embedder()), device, dtype)
    return measure_arrivals(embedder, paragraphs[:_ARRIVALS], repeats=1)


def _patch_table(title: str) -> Table:
    """A table with a column for the patch alone, which loses nothing."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    table.add_column("")
    for name in ("unpatched", "slimformer.patch(model)", "change"):
        table.add_column(name, justify="right")
    return table


def _arrivals_table(arrivals: Arrivals) -> Table:
    table = _patch_table(
        f"{arrivals.texts} paragraphs in batches of {arrivals.batch_size}, in arrival order, all-MiniLM-L6-v2"
    )
    table.add_row(
        "Texts per second",
        f"{arrivals.dense_per_second:.1f}",
        f"{arrivals.patched_per_second:.1f}",
        f"{arrivals.speedup:.2f}× as fast",
    )
    table.add_row("Lowest cosine", "1", f"{arrivals.lowest_cosine:.6f}", "")
    return table


def _decoder(
    model: str | None, device: str, dtype: str
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
    """A name to show, the model, and its tokenizer."""
    from slimformer.cli.commands.demo_models import demo_model
    from slimformer.cli.loading import load_model, load_tokenizer
    from slimformer.errors import CalibrationError
    from slimformer.evaluation.readable import predicts_tokens
    from slimformer.model.anatomy import find_anatomy

    path = model or str(demo_model())
    tokenizer, loaded = load_tokenizer(path), load_model(path, device, dtype)
    if not predicts_tokens(loaded, find_anatomy(loaded)):
        raise CalibrationError(
            f"{type(loaded).__name__} predicts no tokens, and the demo reads prompts. Give a decoder with a "
            "language-model head; for embeddings try slimformer calibrate exit."
        )
    return model or "SmolLM2-135M-Instruct", loaded, tokenizer


def _batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], seed: int
) -> PaddedPrompts:
    from slimformer.evaluation.readable import longest
    from slimformer.evaluation.timing.padded_prompts import measure_padded_prompts
    from slimformer.model.anatomy import find_anatomy

    room = longest(find_anatomy(model), tokenizer)
    return measure_padded_prompts(model, tokenizer, texts=texts, longest=min(_BATCHED, room), seed=seed)


def _batch_table(batch: PaddedPrompts, name: str) -> Table:
    from slimformer.report.summary import seconds

    table = _patch_table(
        f"{batch.prompts} prompts of {batch.longest // batch.prompts} to {batch.longest} tokens in one batch, {name}"
    )
    table.add_row(
        "First tokens",
        seconds(batch.dense_seconds),
        seconds(batch.patched_seconds),
        f"{batch.speedup:.2f}× as fast",
    )
    table.add_row("Difference of logits", "0", f"{batch.difference:.1e}", "")
    return table


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    source: str,
    output: Path,
    prompt: int,
    prompts: int,
    seed: int,
) -> tuple[Plan, Path]:
    """Measure a plan on long prompts, write it and its page."""
    from slimformer import Plan, TokenElimination
    from slimformer.calibration.drops.drop import versions
    from slimformer.cli.work import keep
    from slimformer.evaluation.readable import longest
    from slimformer.evaluation.timing.long_prompts import measure_long_prompts
    from slimformer.model.anatomy import find_anatomy
    from slimformer.plans.plan import fingerprint
    from slimformer.report import plan_page

    anatomy = find_anatomy(model)
    room = longest(anatomy, tokenizer)
    answer = max(2, min(_ANSWER, room // 4))
    tokens = min(prompt, room - answer)
    start = max(1, round(_FROM * len(anatomy.layers)))
    method = TokenElimination(
        {start: _KEEP}, block=min(_BLOCK, max(1, tokens // 16)), least=min(_SHORTEST, tokens)
    )
    plan = Plan([method], fingerprint(model), {**versions(anatomy), "chosen": _CHOSEN})
    found = measure_long_prompts(
        model,
        tokenizer,
        plan,
        texts=texts,
        prompt_tokens=tokens,
        answer_tokens=answer,
        count=prompts,
        seed=seed,
    )
    plan = keep(output, plan, _measured(found, source))
    page = output / "plan.html"
    write_text(page, plan_page(plan))
    return plan, page


def _measured(found: LongPromptComparison, source: str) -> dict[str, Any]:
    """The figures as plans hold them."""
    both = {"dense": found.dense, "slim": found.slim}
    facts = found.prompts // 2
    return {
        "quality": {
            **{f"perplexity_{name}": math.exp(one.loss) for name, one in both.items()},
            # Counts, since a few prompts bear no percentage.
            **{
                f"facts_recalled_{name}": f"{round(one.recalled * facts)} of {facts}"
                for name, one in both.items()
            },
            "data": source,
        },
        "speed": {
            **{
                name: {"prefill_seconds": one.first_token_seconds, "cache_bytes": one.cache_bytes}
                for name, one in both.items()
            },
            "prefill_speedup": found.speedup,
            "prompt_tokens": found.prompt_tokens,
            "prompts": found.prompts,
        },
    }

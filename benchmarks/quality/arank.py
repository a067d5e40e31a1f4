"""ARank by sampled rows of the attention maps beside the full maps: the order of layers, time and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.frame import tables
from benchmarks.frame.inputs import C4, decoder
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from slimformer.model.anatomy import find_anatomy
from slimformer.text.sources import load_texts, token_blocks
from slimformer.training.routing.arank import QUERIES, layer_ranks

SAMPLED, FULL = f"{QUERIES} rows of every map", "all rows"
METRICS = ("effective_rank", "rank")


@benchmark(
    "arank",
    "ARank of every layer by some rows of its maps and by all: order, time and memory",
    model="decoder",
    data=(C4,),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """All layers where full maps can be decomposed, the first layers where that takes too long."""
    lengths: tuple[int, ...] = settings.pick((1024, 4096), (64,))
    for tokens in lengths:
        # A map of 4096 tokens takes many seconds to decompose, and a model has hundreds.
        layers = None if tokens <= 1024 else 1
        ranks: dict[tuple[str, str], list[float]] = {}
        for metric in METRICS if layers is None and not settings.smoke else METRICS[:1]:
            for name in (SAMPLED, FULL):
                # In a process of its own, whose peak of memory is its own.
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    found, seconds, peak = pool.submit(
                        ranked, settings, tokens, metric, name == SAMPLED, layers
                    ).result()
                ranks[metric, name] = found
                at: Parameters = {"tokens": tokens, "metric": metric, "layers": len(found)}
                values = {"seconds": seconds, "mebibytes": peak / 2**20}
                if name == FULL and len(found) > 1:
                    values["spearman"] = spearman(ranks[metric, SAMPLED], found)
                order = sorted(range(len(found)), key=lambda index: found[index])
                yield Measurement(at, name, values=values, note=f"layers, lowest first: {order}")


def ranked(
    settings: Settings, tokens: int, metric: str, sampled: bool, layers: int | None
) -> tuple[list[float], float, float]:
    """The ranks, the seconds that they took, and the bytes that this needed beyond the model."""
    model, tokenizer = decoder(settings)
    anatomy = find_anatomy(model)
    texts = load_texts(settings.data / C4)[0]
    rows = token_blocks(texts, tokenizer, sequence_length=tokens, count=1, seed=0)
    with torch.no_grad():
        # Once, so that libraries are loaded and the model's own pass is part of both.
        model(input_ids=rows[:, :8].to(settings.device), use_cache=False)
        peak = _peak(settings)
        start = time.monotonic()
        found = layer_ranks(
            anatomy,
            [rows],
            metric="rank" if metric == "rank" else "effective_rank",
            queries=QUERIES if sampled else None,
            layers=layers,
        )
    return found, time.monotonic() - start, peak()


def spearman(first: list[float], second: list[float]) -> float:
    """The correlation of the places in order."""
    places = [torch.tensor(values).argsort().argsort().double() for values in (first, second)]
    return float(torch.corrcoef(torch.stack(places))[0, 1])


def _peak(settings: Settings) -> Callable[[], float]:
    """Says how many bytes were needed at most since it was made."""
    if settings.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return lambda: float(torch.cuda.max_memory_allocated() - before)
    # Linux takes a 5 here as the wish to forget the peak so far.
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    resident = _resident_peak()
    return lambda: _resident_peak() - resident


def _resident_peak() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024.0 * float(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


@table("arank")
def orders(content: dict[str, Any]) -> str:
    """One row per length and metric."""
    rows = [
        (f"{at['tokens']} tokens, {at['metric'].replace('_', ' ')}, {at['layers']} layers", at)
        for at in tables.points(content, "tokens", "metric", "layers")
    ]
    some, all_ = {"candidate": SAMPLED}, {"candidate": FULL}
    columns = [
        (f"{QUERIES} rows, s", some, tables.value("seconds", ".1f")),
        ("all rows, s", all_, tables.value("seconds", ".1f")),
        (f"{QUERIES} rows, MiB", some, tables.value("mebibytes", ".0f")),
        ("all rows, MiB", all_, tables.value("mebibytes", ".0f")),
        ("Spearman", all_, tables.value("spearman", ".3f")),
    ]
    return tables.grid(content, "SmolLM2-135M", rows, columns)

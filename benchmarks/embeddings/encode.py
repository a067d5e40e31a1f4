"""sentence-transformers' `encode` unpatched, patched without a plan, and with early exits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import slimformer
from benchmarks.embeddings.inputs import embedder, lines, retrieval_task
from benchmarks.frame import tables
from benchmarks.frame.compare import against, compare
from benchmarks.frame.inputs import CRANFIELD, LOSSLESS, QMSUM, UNPATCHED, WIKI_TEST
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.frame.timing import Candidate, Effort, interleaved
from slimformer import EarlyExit
from slimformer.model.anatomy import find_anatomy

BATCH = 32
# What a model is made into before texts are timed.
Ways = Mapping[str, Callable[[], object]]
_BATCHES = 4
_EFFORT = Effort(milliseconds=60_000.0, least=7, most=15)
_CORPUS_EFFORT = Effort(milliseconds=0.0, least=3, most=3, warm_ups=1)


@benchmark(
    "encode",
    "lines of WikiText-2 through encode: arrival order and one call, patched or not",
    model="embedding model",
    data=(WIKI_TEST,),
)
def some_lines(settings: Settings) -> Iterator[Measurement]:
    """Batches as a server gets them, one call each; then all texts in one call, which sorts them by length."""
    model = embedder(settings)
    texts = lines(settings, WIKI_TEST)[: BATCH * settings.pick(_BATCHES, 1)]
    depth = len(find_anatomy(model).layers)
    exits = {f"exit at layer {layer}, head": layer for layer in range(depth - 1, depth // 2 - 1, -1)}
    head = _head_that_changes_nothing(model)
    ways = plain_ways(model)
    for name, layer in exits.items():
        ways[name] = partial(slimformer.patch, model, EarlyExit(layer, head))
    for name, calls in (("batches in arrival order", in_batches(texts)), ("one call", [texts])):
        slimformer.unpatch(model)
        expected = dict.fromkeys(ways, encoded(model, calls))
        for exit_name, layer in exits.items():
            expected[exit_name] = _without_upper_layers(model, layer, calls)
        at: Parameters = {"texts": len(texts), "calls": name}
        yield from compared(settings, at, model, calls, ways, expected, _EFFORT)
    slimformer.unpatch(model)


@benchmark(
    "encode_corpora",
    "Cranfield, QMSum's queries and lines of WikiText-2 through encode on the CPU",
    on="CPU",
    model="embedding model",
    data=(CRANFIELD, QMSUM, WIKI_TEST),
)
def corpora_on_cpu(settings: Settings) -> Iterator[Measurement]:
    """Whole corpora in one call, which sorts them by length, and in a server's batches; float32."""
    queries = (settings.data / QMSUM / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    corpora = {
        "Cranfield, documents": retrieval_task(settings).texts,
        "QMSum, queries": [str(json.loads(line)["text"]) for line in queries],
        "WikiText-2, lines": lines(settings, WIKI_TEST),
    }
    model = embedder(settings)
    ways = plain_ways(model)
    for name, texts in corpora.items():
        right = dict.fromkeys(ways, encoded(model, [texts]))
        for kind, calls in (
            ("one call", [texts]),
            (f"batches of {BATCH} in arrival order", in_batches(texts)),
        ):
            at: Parameters = {"corpus": name, "texts": len(texts), "calls": kind, "dtype": "float32"}
            yield from compared(settings, at, model, calls, ways, right, _CORPUS_EFFORT)
            slimformer.unpatch(model)


def plain_ways(model: Any) -> dict[str, Callable[[], object]]:
    """Unpatched, and patched without a plan."""
    return {UNPATCHED: partial(slimformer.unpatch, model), LOSSLESS: partial(slimformer.patch, model)}


def in_batches(texts: list[str]) -> list[list[str]]:
    """Texts in the order in which they come, a call for each batch."""
    return [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]


def encoded(model: Any, calls: Sequence[list[str]]) -> Tensor:
    """Embeddings `[texts, hidden]` of all calls, in float32 on the CPU."""
    found = [model.encode(call, batch_size=BATCH, show_progress_bar=False) for call in calls]
    return torch.cat([torch.from_numpy(part).float() for part in found])


def compared(
    settings: Settings,
    at: Parameters,
    model: Any,
    calls: Sequence[list[str]],
    ways: Ways,
    expected: Mapping[str, Tensor],
    effort: Effort = _EFFORT,
) -> Iterator[Measurement]:
    """Times of every way in turns; what has no embeddings to be compared with is another model, and not judged."""
    run = partial(encoded, model, calls)
    cases = {
        name: against(
            expected.get(name),
            run,
            math.inf if name == UNPATCHED else 1e-5,
            prepare=prepare,
            yardstick=None if name == UNPATCHED else UNPATCHED,
        )
        for name, prepare in ways.items()
    }
    yield from compare(settings, at, cases, regime="wall", baseline=UNPATCHED, effort=effort)


def seconds(
    settings: Settings, model: Any, calls: Sequence[list[str]], ways: Ways, rounds: int
) -> dict[str, float]:
    """The median time to encode the texts, of every way in turns."""
    rounds = settings.pick(rounds, 1)
    candidates = {name: Candidate(partial(encoded, model, calls), way) for name, way in ways.items()}
    effort = Effort(milliseconds=0.0, least=rounds, most=rounds, warm_ups=1)
    times = interleaved(candidates, settings.device, regime="wall", effort=effort)
    return {name: time.p50 / 1e3 for name, time in times.items()}


def _head_that_changes_nothing(model: Any) -> dict[str, Tensor]:
    """Costs what a fitted head costs."""
    hidden = find_anatomy(model).stack.config.hidden_size
    return {"head.weight": torch.zeros(hidden, hidden), "head.bias": torch.zeros(hidden)}


def _without_upper_layers(model: Any, layer: int, calls: Sequence[list[str]]) -> Tensor:
    """Embeddings of the unpatched model without the layers above, which are put back."""
    layers = find_anatomy(model).layers
    above = list(layers[layer:])
    del layers[layer:]
    try:
        return encoded(model, calls)
    finally:
        layers.extend(above)


@table("encode")
def throughput_of_lines(content: dict[str, Any]) -> str:
    """Texts per second, and how many times those of the unpatched pipeline."""
    columns: list[tuple[str, dict[str, Any], tables.Cell]] = []
    for at in tables.points(content, "calls"):
        columns.append((f"{at['calls']}, texts per second", at, _rate))
        columns.append(("gain", at, tables.gain))
    rows = [(name, {"candidate": name}) for name in tables.candidates(content)]
    return tables.grid(content, "", rows, columns)


@table("encode_corpora")
def throughput_of_corpora(content: dict[str, Any]) -> str:
    """One row per corpus, kind of call and dtype: texts per second of all candidates, and their gain."""

    def cell(measurement: dict[str, Any] | None) -> str:
        if measurement is None or measurement["candidate"] == UNPATCHED:
            return _rate(measurement)
        return f"{_rate(measurement)} ({tables.gain(measurement)})"

    rows = [
        (f"{at['corpus']}, {at['calls']}, {at['dtype']}".removesuffix(", float32"), at)
        for at in tables.points(content, "corpus", "calls", "dtype")
    ]
    columns = [(name, {"candidate": name}, cell) for name in tables.candidates(content)]
    return tables.grid(content, "Texts per second", rows, columns)


def _rate(measurement: dict[str, Any] | None) -> str:
    if measurement is None:
        return "–"
    return tables.number(1000 * measurement["parameters"]["texts"] / measurement["milliseconds"]["p50"])

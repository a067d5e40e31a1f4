"""Retrieval by an embedding model that exits early, with and without a fitted head, at several widths."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import slimformer
from benchmarks.embeddings.inputs import embedder, lines, retrieval_task, sentences
from benchmarks.frame import tables
from benchmarks.frame.inputs import CRANFIELD, DENSE, STS_TRAIN, WIKI_TRAIN
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer import EarlyExit
from slimformer.calibration.exit_heads import fit_exits
from slimformer.evaluation.retrieval import RetrievalTask
from slimformer.model.anatomy import find_anatomy

BARE, ELSEWHERE, CORPUS = "no head", "head fitted on WikiText-2 and STS", "head fitted on the corpus"
WIDTHS = (384, 192, 96, 48, 24)
# Sentences and lines of other text that heads are fitted on.
_LINES, _SENTENCES = 1500, 3000


@benchmark(
    "elastic",
    "nDCG@10 on Cranfield of every early exit of an embedding model at five widths",
    model="embedding model",
    data=(CRANFIELD, WIKI_TRAIN, STS_TRAIN),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """All 225 queries, float32; the heads have seen no query and no judgement."""
    model = embedder(settings)
    task, elsewhere = retrieval_task(settings), _other_texts(settings)
    depth = len(find_anatomy(model).layers)
    widths = settings.pick(WIDTHS, (32, 16))
    yield from _row(model, task, depth, DENSE, widths)
    heads = {
        CORPUS: fit_exits(model, task.texts),
        ELSEWHERE: fit_exits(model, elsewhere),
        BARE: {layer: EarlyExit(layer) for layer in range(depth)},
    }
    for name, exits in heads.items():
        for layer in range(depth - 1, -1, -1):
            with slimformer.patched(model, exits[layer]):
                yield from _row(model, task, layer, name, widths if name == CORPUS else widths[:1])


def _other_texts(settings: Settings) -> list[str]:
    chosen = random.Random(0)
    counts = ((lines(settings, WIKI_TRAIN), _LINES), (sentences(settings), _SENTENCES))
    return [text for texts, count in counts for text in chosen.sample(texts, min(count, len(texts)))]


def _row(
    model: Any, task: RetrievalTask, layers: int, name: str, widths: tuple[int, ...]
) -> Iterator[Measurement]:
    for width, score in zip(widths, task.scores(model, widths), strict=True):
        yield Measurement({"layers": layers, "dimensions": width}, name, values={"ndcg": score})


@table("elastic")
def retrieval(content: dict[str, Any]) -> str:
    """One row per exit: the three heads at full width, then the widths of the head fitted on the corpus."""
    widths = sorted(tables.distinct(content, "dimensions"), reverse=True)
    rows = []
    for layers in tables.distinct(content, "layers"):
        dense = tables.find(content, DENSE, layers=layers) is not None
        cut = [(DENSE if dense else CORPUS, width) for width in widths]
        found = [
            tables.find(content, name, layers=layers, dimensions=width)
            for name, width in [(BARE, widths[0]), (ELSEWHERE, widths[0]), *cut]
        ]
        cells = [tables.shown(tables.figure(one, "ndcg"), ".3f") for one in found]
        rows.append([f"{layers} (dense)" if dense else str(layers), *cells])
    head = ["Layers that run", BARE, ELSEWHERE, f"{CORPUS}, {widths[0]} dimensions", *map(str, widths[1:])]
    return tables.markdown(head, rows)

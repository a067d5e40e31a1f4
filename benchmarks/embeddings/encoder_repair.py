"""What repair wins back in a small embedding model: retrieval and similarity before and after, with the speed."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import slimformer
from benchmarks.embeddings.encode import compared, encoded, plain_ways
from benchmarks.embeddings.inputs import embedder, lines, retrieval_task, sentences
from benchmarks.frame import tables
from benchmarks.frame.inputs import (
    CRANFIELD,
    DENSE,
    LOSSLESS,
    QMSUM,
    STS_TEST,
    STS_TRAIN,
    WIKI_TEST,
    WIKI_TRAIN,
    encoder,
    kept,
    repaired,
)
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer import LayerDrop, Plan
from slimformer.evaluation.embedding_tasks import EmbeddingTask, PairTask
from slimformer.evaluation.similarity_task import read_sts
from slimformer.plans.plan import fingerprint

BEFORE, AFTER = "as calibrated", "repaired"
TRAINING_DATA = (CRANFIELD, WIKI_TRAIN, STS_TRAIN)
# Whole layers that are dropped; the first four of six do most of the work.
BLOCKS: tuple[tuple[int, ...], ...] = ((4,), (2, 4), (1, 2, 4))
FIGURES = {"cranfield": "Cranfield, nDCG@10", "qmsum": "QMSum, nDCG@10", "sts": "STS-B test, Spearman × 100"}
_TEXTS_TIMED = 128


def folder_of(blocks: tuple[int, ...]) -> str:
    """Where a plan without some layers is kept, and its name for `--only`."""
    return "blocks-" + "-".join(map(str, blocks))


@benchmark(
    "encoder_repair",
    "Cranfield, QMSum and STS-B of an embedding model without some layers, repaired",
    model="embedding model",
    data=(*TRAINING_DATA, QMSUM, STS_TEST, WIKI_TEST),
    parts=list(map(folder_of, BLOCKS)),
    takes=("plans",),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Repair on texts of Cranfield, WikiText-2 and STS-B train without labels; QMSum is not read before it is asked."""
    texts = training_texts(settings)
    plans: dict[str, tuple[Plan, Plan, float]] = {}
    for blocks in settings.pick(BLOCKS, ((1,),)):
        if settings.wants(folder_of(blocks)):
            plan = Plan([LayerDrop(block=blocks)])
            name = f"{'layer' if len(blocks) == 1 else 'layers'} {', '.join(map(str, blocks))}"
            plans[name] = (plan, *repaired_plan(settings, settings.plans / folder_of(blocks), plan, texts))
    model = embedder(settings)
    pairs, gold = read_sts(settings.data / STS_TEST)
    tasks: dict[str, EmbeddingTask] = {
        "cranfield": retrieval_task(settings),
        "qmsum": retrieval_task(settings, QMSUM),
        "sts": PairTask("STS-B test", pairs, gold),
    }

    def figures() -> dict[str, float]:
        return {name: task.scores(model)[0] for name, task in tasks.items()}

    yield Measurement({"dropped": "none"}, DENSE, values=figures())
    for name, (plan, better, seconds) in plans.items():
        for candidate, found in ((BEFORE, plan), (AFTER, better)):
            with slimformer.patched(model, found):
                values = figures()
            if candidate == AFTER:
                values["seconds"] = seconds
            yield Measurement({"dropped": name}, candidate, values=values)
    timed = lines(settings, WIKI_TEST)[: settings.pick(_TEXTS_TIMED, 8)]
    ways = plain_ways(model)
    expected = dict.fromkeys(ways, encoded(model, [timed]))
    ways |= {name: partial(slimformer.patch, model, better) for name, (_, better, _) in plans.items()}
    yield from compared(settings, {"texts": len(timed)}, model, [timed], ways, expected)


def repaired_plan(settings: Settings, folder: Path, plan: Plan, texts: list[str]) -> tuple[Plan, float]:
    """A plan, repaired with the mean as the encoder's pooling, and the seconds that this took."""
    steps, rows, length = (1500, 64, 256) if settings.on_gpu else (240, 32, 128)

    def make() -> Plan:
        model, tokenizer = encoder(settings)
        own = Plan(plan.methods, fingerprint(model))
        return repaired(
            settings, model, tokenizer, own, texts, steps=steps, rows=rows, length=length, rank=64, every=50
        )

    return kept(folder, make)


def training_texts(settings: Settings) -> list[str]:
    """Texts without labels: Cranfield's documents, lines of WikiText-2, sentences of STS-B train."""
    return [*retrieval_task(settings).texts, *lines(settings, WIKI_TRAIN), *sentences(settings)]


@table("encoder_repair")
def embeddings(content: dict[str, Any]) -> str:
    """One row per plan: every figure before and after, what is lost then, and the speed."""
    dense = tables.find(content, DENSE, dropped="none")
    if dense is None:
        return ""
    known = [name for name in FIGURES if name in dense["values"]]
    rows = [[DENSE, *(_shown(name, dense["values"][name]) for name in known), "1.00×"]]
    rows.append([LOSSLESS, *("the same" for _ in known), _gain(content, LOSSLESS)])
    for name in tables.distinct(content, "dropped", where=lambda at: at.get("dropped", "none") != "none"):
        before, after = (tables.find(content, candidate, dropped=name) for candidate in (BEFORE, AFTER))
        if before is None or after is None:
            continue
        cells = []
        for figure in known:
            old, new, own = (found["values"][figure] for found in (before, after, dense))
            cells.append(f"{_shown(figure, old)} → {_shown(figure, new)} ({tables.change(new, own)})")
        rows.append([f"without {name}", *cells, _gain(content, name)])
    return tables.markdown(["", *(FIGURES[name] for name in known), "encode, speed"], rows)


def _shown(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "sts" else f"{value:.3f}"


def _gain(content: dict[str, Any], name: str) -> str:
    return tables.gain(tables.find(content, name, regime="wall"))

"""An embedding model without a part of its layers, repaired on what it is to embed: what is kept, how fast it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from random import Random
from typing import Any

import slimformer
from benchmarks.embeddings.encode import compared, encoded, plain_ways
from benchmarks.embeddings.engines import ALPACA, DOLLY, WIKI, neighbours, other_texts
from benchmarks.embeddings.inputs import embedder, retrieval_task, sentences
from benchmarks.embeddings.judged import Vectors, vectors
from benchmarks.frame import tables
from benchmarks.frame.compare import release
from benchmarks.frame.inputs import C4, CRANFIELD, DENSE, QMSUM, STS_TEST, STS_TRAIN, WIKI_TRAIN, kept
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer import LayerDrop, Plan
from slimformer.evaluation.embedding_tasks import PairTask
from slimformer.evaluation.similarity_task import read_sts
from slimformer.model.anatomy import find_anatomy
from slimformer.training.loop import TrainingSettings

# Which part of the layers goes.
PARTS = {"third": 1 / 3, "half": 1 / 2, "two-thirds": 2 / 3}
CHOSEN, REPAIRED = "as chosen", "repaired"
FIGURES = {"cranfield": "Cranfield, nDCG@10", "qmsum": "QMSum, nDCG@10", "sts": "STS-B test, Spearman × 100"}
_MIXED = {"dense queries": "Cranfield, dense queries", "dense documents": "Cranfield, dense documents"}
_MINUTES, _TIMED = 5.0, 512
# How often the documents to embed, and their sentences, are read beside other text.
_OFTEN, _SENTENCES = 12, 2


@benchmark(
    "encoder_depth",
    "Cranfield, QMSum and STS-B of an embedding model without a part of its layers, repaired on the corpus to embed",
    model="embedding model",
    data=(CRANFIELD, QMSUM, STS_TRAIN, STS_TEST, C4, WIKI, WIKI_TRAIN, DOLLY, ALPACA),
    parts=tuple(PARTS),
    takes=("plans", "training"),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Repair on documents of Cranfield and sentences of STS-B train without labels; QMSum is not read by anything."""
    model = embedder(settings)
    texts = depth_texts(settings)
    judge = _judge(settings, model)
    yield Measurement({"dropped": "none"}, DENSE, values=judge(model))
    depth = len(find_anatomy(model).layers)
    plans: dict[str, Plan] = {}
    for part in settings.chosen(tuple(PARTS)):
        number = max(round(depth * PARTS[part]), 1)
        name = f"{number} of {depth} layers"
        chosen, choosing = kept(
            settings.plans / f"{part}-chosen", partial(_chosen, settings, model, texts, number)
        )
        better, seconds = kept(settings.plans / part, partial(_repaired, settings, model, texts, chosen))
        plans[name] = better
        for candidate, plan in ((CHOSEN, chosen), (REPAIRED, better)):
            with slimformer.patched(model, plan):
                values = judge(model)
            taken = {"choosing_seconds": choosing} if candidate == CHOSEN else {"repair_seconds": seconds}
            note = ", ".join(map(str, plan.dropped("attention")))
            yield Measurement({"dropped": name}, candidate, values=values | taken, note=note)
        release()
    # In batches of a server, and in order of length as `encode` sorts a corpus.
    documents = retrieval_task(settings).texts
    count = settings.pick(_TIMED, 8)
    for order, calls in (("arrival", [documents[:count]]), ("sorted", neighbours(documents, count))):
        slimformer.unpatch(model)
        ways = plain_ways(model)
        expected = dict.fromkeys(ways, encoded(model, calls))
        ways |= {name: partial(slimformer.patch, model, plan) for name, plan in plans.items()}
        yield from compared(settings, {"texts": count, "order": order}, model, calls, ways, expected)


def depth_texts(settings: Settings) -> list[str]:
    """What is to be embedded, whole and by sentences, and as much of other text; no query and no label."""
    documents = retrieval_task(settings).texts
    parts = [part.strip() for text in documents for part in re.split(r"(?<=[.?!]) +", text) if len(part) > 30]
    own = [*documents * _OFTEN, *parts * _SENTENCES, *sentences(settings)]
    found = [*own, *other_texts(settings)[: 2 * len(own)]]
    Random(0).shuffle(found)
    return found


def _chosen(settings: Settings, model: Any, texts: list[str], number: int) -> Plan:
    return slimformer.calibrate(
        model,
        method=LayerDrop,
        data=texts,
        drop=number,
        kinds=("block",),
        budget=settings.pick("standard", "quick") if settings.on_gpu else "quick",
    )


def _repaired(settings: Settings, model: Any, texts: list[str], plan: Plan) -> Plan:
    rows, rank = (256, 256) if settings.on_gpu else (32, 64)
    training = TrainingSettings(
        steps=settings.pick(4000, 2),
        rows=settings.pick(rows, 2),
        learning_rate=1e-3,
        precision="bf16" if settings.on_gpu else "no",
        keep_every=10_000,
    )
    return slimformer.repair(
        model,
        plan,
        data=texts,
        near=None,
        rank=settings.pick(rank, 2),
        length=settings.pick(256, 64),
        minutes=settings.training or _MINUTES,
        patience=99,
        settings=training,
    )


def _judge(settings: Settings, model: Any) -> Callable[[Any], dict[str, float]]:
    """From a model to its figures, and to those of its documents or queries beside the dense model's."""
    pairs, gold = read_sts(settings.data / STS_TEST)
    sts = PairTask("STS-B test", pairs, gold)
    tasks = {"cranfield": retrieval_task(settings), "qmsum": retrieval_task(settings, QMSUM)}
    dense = {name: vectors(model, task, sts) for name, task in tasks.items()}

    def judge(model: Any) -> dict[str, float]:
        own = {name: vectors(model, task, sts) for name, task in tasks.items()}
        found = {name: task.scores(own[name])[0] for name, task in tasks.items()}
        found["sts"] = sts.scores(own["cranfield"])[0]
        mine, other = own["cranfield"], dense["cranfield"]
        mixed = {
            "dense queries": Vectors(mine.documents, other.queries, {}),
            "dense documents": Vectors(other.documents, mine.queries, {}),
        }
        return found | {name: tasks["cranfield"].scores(both)[0] for name, both in mixed.items()}

    return judge


@table("encoder_depth")
def depths(content: dict[str, Any]) -> str:
    """One row per plan: every figure before and after its repair, and the gain of `encode`."""
    dense = tables.find(content, DENSE, dropped="none")
    if dense is None:
        return ""
    shown = FIGURES | _MIXED
    rows = [[DENSE, *(_shown(name, dense["values"][name]) for name in shown), "1.00×", "1.00×"]]
    for name in tables.distinct(content, "dropped", where=lambda at: at.get("dropped", "none") != "none"):
        before, after = (tables.find(content, candidate, dropped=name) for candidate in (CHOSEN, REPAIRED))
        if before is None or after is None:
            continue
        cells = []
        for figure in shown:
            old, new, own = (found["values"][figure] for found in (before, after, dense))
            cells.append(f"{_shown(figure, old)} → {_shown(figure, new)} ({tables.change(new, own)})")
        gains = [tables.gain(tables.find(content, name, order=order)) for order in ("arrival", "sorted")]
        rows.append([f"without {name}", *cells, *gains])
    ends = ["encode, as texts come", "encode, sorted"]
    return tables.markdown(["", *shown.values(), *ends], rows)


def _shown(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "sts" else f"{value:.3f}"

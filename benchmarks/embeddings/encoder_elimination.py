"""Retrieval and throughput of an embedding model whose layers pass tokens by."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import slimformer
from benchmarks.embeddings.encode import seconds
from benchmarks.embeddings.encoder_repair import TRAINING_DATA, repaired_plan, training_texts
from benchmarks.embeddings.inputs import embedder, retrieval_task
from benchmarks.frame import tables
from benchmarks.frame.inputs import CRANFIELD, QMSUM, UNPATCHED
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer import LayerDrop, Plan, TokenElimination
from slimformer.plans.plan import PlannedMethod

DENSE = "dense, unpadded"
_SHORT: dict[str, Any] = {"least": 32, "window": 1, "sink": 1}
METHODS: dict[str, TokenElimination] = {
    "90% from layer 2 on, mean of those left": TokenElimination({2: 0.9}, left_as="mean", **_SHORT),
    "80% from layer 5 on, mean of those left": TokenElimination({5: 0.8}, left_as="mean", **_SHORT),
    "50% from layer 5 on, mean of those left": TokenElimination({5: 0.5}, left_as="mean", **_SHORT),
    "50% from layer 4 on, mean of those left": TokenElimination({4: 0.5}, left_as="mean", **_SHORT),
    "50% from layer 4 on": TokenElimination({4: 0.5}, **_SHORT),
    "MLPs: 70% from layer 3 on": TokenElimination({3: 0.7}, revivable=True, kinds=["mlp"], **_SHORT),
    "MLPs: 50% from layer 3 on": TokenElimination({3: 0.5}, revivable=True, kinds=["mlp"], **_SHORT),
    "random: 50% from layer 4 on": TokenElimination({4: 0.5}, scorer="random", **_SHORT),
}


class Repaired(NamedTuple):
    """Methods that are repaired as layers that are dropped are: without labels, and without QMSum; and what joins them.

    Attributes:
        folder: Where the repaired plan is kept.
        methods: The repaired ones.
        joined: Others, as they are.
    """

    folder: str
    methods: Sequence[PlannedMethod]
    joined: Sequence[PlannedMethod] = ()


REPAIRED = {
    "60% from layer 4 on, mean of those left, repaired": Repaired(
        "keep-60-from-4", [TokenElimination({4: 0.6}, left_as="mean", **_SHORT)]
    ),
    "45% from layer 2 on, mean of those left, repaired": Repaired(
        "keep-45-from-2", [TokenElimination({2: 0.45}, left_as="mean", **_SHORT)]
    ),
    "without layers 2, 4, repaired": Repaired("blocks-2-4", [LayerDrop(block=(2, 4))]),
    "without layers 2, 4, repaired; 80% from layer 5 on, mean of those left": Repaired(
        "blocks-2-4", [LayerDrop(block=(2, 4))], [TokenElimination({5: 0.8}, left_as="mean", **_SHORT)]
    ),
}
_TINY = {"50% from layer 2 on": TokenElimination({2: 0.5}, least=8, window=1, sink=1)}
_TINY_REPAIRED = {
    "layer 1 dropped, repaired": Repaired("tiny", [LayerDrop(block=(1,))], list(_TINY.values()))
}
_DOCUMENTS, _ROUNDS = 64, 5
# Collections, and how many of their queries are asked: one in so many. QMSum has 1527.
_COLLECTIONS = {CRANFIELD: 1, QMSUM: 3}


@benchmark(
    "encoder_elimination",
    "nDCG@10 and throughput of an embedding model that eliminates tokens",
    model="embedding model",
    data=(*TRAINING_DATA, QMSUM),
    takes=("plans",),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Every method on every collection; times of the same documents in turns."""
    model = embedder(settings)
    ways: dict[str, Any] = {
        UNPATCHED: partial(slimformer.unpatch, model),
        DENSE: partial(slimformer.patch, model),
    }
    methods: dict[str, TokenElimination | Plan] = {
        **settings.pick(METHODS, _TINY),
        **dict(_repaired(settings)),
    }
    ways |= {name: partial(slimformer.patch, model, method) for name, method in methods.items()}
    for folder, step in _COLLECTIONS.items():
        task = retrieval_task(settings, folder)
        asked = {query: task.queries[query] for query in list(task.queries)[::step]}
        task = dataclasses.replace(task, queries=asked)
        texts = task.texts[: settings.pick(_DOCUMENTS, 8)]
        times = seconds(settings, model, [texts], ways, _ROUNDS)
        for name, apply in ways.items():
            apply()
            values = {"nDCG@10": task.figures(model)["nDCG@10"], "speedup": times[DENSE] / times[name]}
            yield Measurement({"collection": folder.rstrip("/")}, name, values=values)


def _repaired(settings: Settings) -> Iterator[tuple[str, Plan]]:
    texts = training_texts(settings)
    for name, wanted in settings.pick(REPAIRED, _TINY_REPAIRED).items():
        plan = repaired_plan(settings, settings.plans / wanted.folder, Plan(wanted.methods), texts)[0]
        yield name, dataclasses.replace(plan, methods=[*plan.methods, *wanted.joined])


@table("encoder_elimination")
def retrieval(content: dict[str, Any]) -> str:
    """One row per method: what is left of each collection's nDCG@10, and the speed beside dense unpadded."""

    def beside_dense(found: dict[str, Any] | None) -> str:
        own = tables.figure(found, "nDCG@10")
        dense = tables.figure(found and tables.find(content, DENSE, **found["parameters"]), "nDCG@10")
        return "–" if own is None or dense is None else f"{own:.4f} ({tables.change(own, dense)})"

    columns: list[tuple[str, dict[str, Any], tables.Cell]] = []
    for name in tables.distinct(content, "collection"):
        columns.append((f"{name}, nDCG@10", {"collection": name}, beside_dense))
        columns.append(("speed", {"collection": name}, tables.value("speedup", unit="×")))
    rows = [(name, {"candidate": name}) for name in tables.candidates(content)]
    return tables.grid(content, "Computed", rows, columns)

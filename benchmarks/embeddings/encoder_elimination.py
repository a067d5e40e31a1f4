"""Retrieval and throughput of an embedding model whose layers pass tokens by."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import slimformer
from benchmarks.elastic import embedder
from benchmarks.encoder_repair import repaired_plan, training_texts
from benchmarks.frame import tables
from benchmarks.frame.registry import MissingInput, Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer import LayerDrop, Plan, TokenElimination
from slimformer.evaluation.retrieval import RetrievalTask, read_retrieval
from slimformer.plans.plan import PlannedMethod

UNPATCHED, DENSE = "unpatched", "dense, unpadded"
_SHORT: dict[str, Any] = {"least": 32, "window": 1, "sink": 1}
Ways = Mapping[str, TokenElimination | Plan]
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
_TINY_SHORT: dict[str, Any] = {"least": 8, "window": 1, "sink": 1}
_TINY = {"50% from layer 2 on": TokenElimination({2: 0.5}, **_TINY_SHORT)}
_TINY_REPAIRED = {
    "layer 1 dropped, repaired": Repaired("tiny", [LayerDrop(block=(1,))], list(_TINY.values()))
}
_DOCUMENTS, _ROUNDS = 64, 5
# Collections, and how many of their queries are asked: one in so many. QMSum has 1527.
_COLLECTIONS = {"cranfield": 1, "qmsum_retrieval": 3}


@benchmark(
    "encoder_elimination",
    needs="any",
    description="nDCG@10 and throughput of an embedding model that eliminates tokens (--model, --data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Every method on every collection; times of the same documents in turns."""
    model = embedder(settings)
    if settings.data is None:
        if not settings.smoke:
            raise MissingInput("it needs --data, a folder with cranfield/ and qmsum_retrieval/")
        words = [f"word {number} and some more of it, as long as it has to be" for number in range(8)]
        corpus = {f"d{number}": text for number, text in enumerate(words)}
        tasks = {"smoke": RetrievalTask("smoke", {"q": words[3]}, corpus, {"q": {"d3"}})}
    else:
        tasks = {
            name: _part(read_retrieval(settings.data / name), step) for name, step in _COLLECTIONS.items()
        }
    methods: Ways = {**settings.pick(METHODS, _TINY), **dict(_repaired(settings))}
    for name, task in tasks.items():
        texts = task.texts[: settings.pick(_DOCUMENTS, 8)]
        seconds = _seconds(model, methods, texts, settings.pick(_ROUNDS, 1))
        for method in seconds:
            _apply(model, method, methods)
            yield Measurement(
                {"collection": name},
                method,
                values={
                    "nDCG@10": task.figures(model)["nDCG@10"],
                    "speedup": seconds[DENSE] / seconds[method],
                },
            )
    slimformer.unpatch(model)


def _repaired(settings: Settings) -> Iterator[tuple[str, Plan]]:
    texts = training_texts(settings)
    for name, wanted in settings.pick(REPAIRED, _TINY_REPAIRED).items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = (settings.plans or Path(temporary)) / wanted.folder
            plan = repaired_plan(settings, folder, Plan(wanted.methods), texts)[0]
        yield name, dataclasses.replace(plan, methods=[*plan.methods, *wanted.joined])


def _part(task: RetrievalTask, step: int) -> RetrievalTask:
    chosen = list(task.queries)[::step]
    return dataclasses.replace(task, queries={query: task.queries[query] for query in chosen})


def _apply(model: Any, name: str, methods: Ways) -> None:
    if name == UNPATCHED:
        slimformer.unpatch(model)
    elif name == DENSE:
        slimformer.patch(model)
    else:
        slimformer.patch(model, methods[name])


def _seconds(model: Any, methods: Ways, texts: list[str], rounds: int) -> dict[str, float]:
    """The median time to encode the texts, of every method in turns."""
    times: dict[str, list[float]] = {name: [] for name in (UNPATCHED, DENSE, *methods)}
    for number in range(rounds + 1):
        for name, found in times.items():
            _apply(model, name, methods)
            begin = time.perf_counter()
            model.encode(texts, batch_size=32, show_progress_bar=False)
            if number:  # the first warms up
                found.append(time.perf_counter() - begin)
    return {name: sorted(found or [1.0])[len(found) // 2] for name, found in times.items()}


@table("encoder_elimination", source="encoder_elimination")
def retrieval(content: dict[str, Any]) -> str:
    """One row per method: what is left of each collection's nDCG@10, and the speed beside dense unpadded."""
    collections = [name for (name,) in tables.points(content, "collection", where=lambda _: True)]
    dense = {name: tables.find(content, DENSE, collection=name) for name in collections}
    rows = []
    for method in dict.fromkeys(measurement["candidate"] for measurement in content["measurements"]):
        row = [method]
        for name in collections:
            found, whole = tables.find(content, method, collection=name), dense[name]
            if found is None or whole is None:
                row += ["–", "–"]
                continue
            figure = found["values"]["nDCG@10"]
            change = 100 * (figure / whole["values"]["nDCG@10"] - 1)
            row += [f"{figure:.4f} ({change:+.1f}%)", f"{found['values']['speedup']:.2f}×"]
        rows.append(row)
    head = ["Computed"]
    for name in collections:
        head += [f"{name}, nDCG@10", "speed"]
    return tables.markdown(head, rows)

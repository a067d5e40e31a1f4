"""Retrieval and throughput of an embedding model whose MLPs are narrow."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import slimformer
from benchmarks.elastic import embedder, retrieval_task
from benchmarks.frame import tables
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer.calibration.narrow_mlps import KEEPS, NarrowFit, units_of

UNPATCHED, DENSE = "unpatched", "slimformer.patch(model)"
_TEXTS, _ROUNDS, BATCH = 96, 3, 32
# Of the hidden units, as many stay.
_KEEPS = KEEPS[:3]


@benchmark(
    "encoder_narrow",
    needs="any",
    description="nDCG@10 on Cranfield and throughput of an embedding model with narrow MLPs (--model, --data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Fitted on the corpus and one half of the queries, without a judgement. Times of the same documents in turns."""
    model = embedder(settings)
    task = retrieval_task(settings)
    choosing, held_out = task.split()
    ways: dict[str, Any] = {
        UNPATCHED: partial(slimformer.unpatch, model),
        DENSE: partial(slimformer.patch, model),
    }
    fitting = NarrowFit(slimformer.unpatch(model), task.texts, list(choosing.queries.values()))
    for keep in settings.pick(_KEEPS, _KEEPS[:1]):
        method = fitting.fit(units_of(model, keep))
        ways[f"{keep:.0%} of the hidden units"] = partial(slimformer.patch, model, method)
    step = max(1, len(task.texts) // settings.pick(_TEXTS, 8))
    texts = task.texts[::step]
    sorted_, arrival = (_seconds(model, ways, calls, settings.pick(_ROUNDS, 1)) for calls in (
        [texts], [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]))  # fmt: skip
    for name, apply in ways.items():
        apply()
        once = _Once(model)
        parts = {"choosing": choosing, "held_out": held_out, "all": task}
        scores = {part: of.scores(once)[0] for part, of in parts.items()}
        # The documents are embedded already: only queries are the dense model's.
        slimformer.unpatch(model)
        scores["dense_queries"] = task.scores(once)[0]
        yield Measurement(
            {"collection": task.source},
            name,
            values={
                **scores,
                "one_call": sorted_[UNPATCHED] / sorted_[name],
                "arrival": arrival[UNPATCHED] / arrival[name],
            },
        )
    slimformer.unpatch(model)


class _Once:
    """A model that embeds the documents of one corpus a single time."""

    def __init__(self, model: Any) -> None:
        self.model, self.documents = model, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def encode_document(self, *texts: Any, **options: Any) -> Any:
        """As the model's own."""
        if self.documents is None:
            self.documents = self.model.encode_document(*texts, **options)
        return self.documents


def _seconds(model: Any, ways: dict[str, Any], calls: list[list[str]], rounds: int) -> dict[str, float]:
    """The median time to encode the texts, of every way in turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, found in times.items():
            ways[name]()
            begin = time.perf_counter()
            for call in calls:
                model.encode(call, batch_size=BATCH, show_progress_bar=False)
            if number:  # the first warms up
                found.append(time.perf_counter() - begin)
    return {name: sorted(found)[len(found) // 2] for name, found in times.items()}


@table("encoder_narrow", source="encoder_narrow")
def retrieval(content: dict[str, Any]) -> str:
    """One row per width: nDCG@10 of both halves of the queries, and the speed beside the unpatched model."""
    dense = tables.find(content, UNPATCHED)
    rows = []
    for measurement in content["measurements"]:
        values, whole = measurement["values"], (dense or measurement)["values"]
        cells = [
            f"{values[part]:.4f} ({100 * (values[part] / whole[part] - 1):+.1f}%)"
            for part in ("choosing", "held_out", "all", "dense_queries")
        ]
        rows.append(
            [
                measurement["candidate"],
                *cells,
                *(f"{values[calls]:.2f}×" for calls in ("one_call", "arrival")),
            ]
        )
    head = [
        "MLPs",
        "nDCG@10, every other query",
        "the held-out queries",
        "all queries",
        "all, embedded by the dense model",
        "one call",
        "arrival order",
    ]
    return tables.markdown(head, rows)

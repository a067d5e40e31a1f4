"""Retrieval and throughput of an embedding model whose MLPs are narrow."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import slimformer
from benchmarks.embeddings.encode import in_batches, plain_ways, seconds
from benchmarks.embeddings.inputs import embedder, retrieval_task
from benchmarks.frame import tables
from benchmarks.frame.inputs import CRANFIELD, UNPATCHED
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from slimformer.calibration.narrow_mlps import KEEPS, NarrowFit, units_of

_TEXTS, _ROUNDS = 96, 3
# Of the hidden units, as many stay.
_KEEPS = KEEPS[:3]
_PARTS = {
    "choosing": "nDCG@10, every other query",
    "held_out": "the held-out queries",
    "all": "all queries",
    "dense_queries": "all, embedded by the dense model",
}
_CALLS = {"one_call": "one call", "arrival": "arrival order"}


@benchmark(
    "encoder_narrow",
    "nDCG@10 on Cranfield and throughput of an embedding model with narrow MLPs",
    model="embedding model",
    data=(CRANFIELD,),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Fitted on the corpus and one half of the queries, without a judgement. Times of the same documents in turns."""
    model = embedder(settings)
    task = retrieval_task(settings)
    choosing, held_out = task.split()
    ways = plain_ways(model)
    fitting = NarrowFit(slimformer.unpatch(model), task.texts, list(choosing.queries.values()))
    for keep in settings.pick(_KEEPS, _KEEPS[:1]):
        method = fitting.fit(units_of(model, keep))
        ways[f"{keep:.0%} of the hidden units"] = partial(slimformer.patch, model, method)
    texts = task.texts[:: max(1, len(task.texts) // settings.pick(_TEXTS, 8))]
    times = {
        name: seconds(settings, model, calls, ways, _ROUNDS)
        for name, calls in (("one_call", [texts]), ("arrival", in_batches(texts)))
    }
    for name, apply in ways.items():
        apply()
        once = _Once(model)
        parts = {"choosing": choosing, "held_out": held_out, "all": task}
        values = {part: of.scores(once)[0] for part, of in parts.items()}
        # The documents are embedded already: only queries are the dense model's.
        slimformer.unpatch(model)
        values["dense_queries"] = task.scores(once)[0]
        values |= {calls: found[UNPATCHED] / found[name] for calls, found in times.items()}
        yield Measurement({"collection": task.source}, name, values=values)


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


@table("encoder_narrow")
def retrieval(content: dict[str, Any]) -> str:
    """One row per width: nDCG@10 of both halves of the queries, and the speed beside the unpatched model."""
    dense = tables.find(content, UNPATCHED)

    def part(name: str) -> tables.Cell:
        def cell(found: dict[str, Any]) -> str:
            own = found["values"][name]
            return f"{own:.4f} ({tables.change(own, (dense or found)['values'][name])})"

        return cell

    quality = {head: part(name) for name, head in _PARTS.items()}
    speed = {head: tables.value(name, unit="×") for name, head in _CALLS.items()}
    return tables.by_measurement(content, {"MLPs": tables.candidate, **quality, **speed})

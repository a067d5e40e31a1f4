"""sentence-transformers' `encode` on whole corpora, patched or not: on the CPU, and on a GPU in half precision."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import slimformer
from benchmarks.elastic import embedder, lines
from benchmarks.frame import tables
from benchmarks.frame.compare import Case, compare, relative_error
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from benchmarks.frame.timing import Effort
from slimformer.evaluation.retrieval import read_retrieval

DENSE, LOSSLESS = "unpatched", "slimformer.patch(model)"
BATCH = 32
ONE_CALL, ARRIVAL = "one call", f"batches of {BATCH} in arrival order"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@benchmark(
    "encode_corpora",
    needs="any",
    description="Cranfield, QMSum's queries and lines of WikiText-2 through encode on the CPU (--model, --data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Whole corpora in one call, which sorts them by length, and in a server's batches; float32."""
    effort = Effort(milliseconds=0.0, least=3, most=3, warm_ups=1)
    on_cpu = Settings(torch.device("cpu"), settings.smoke, settings.data, settings.model)
    model = embedder(on_cpu)
    for name, texts in corpora(settings).items():
        expected = encode(slimformer.unpatch(model), [texts])
        for calls in (ONE_CALL, ARRIVAL):
            yield from _compared(on_cpu, model, name, texts, calls, "float32", expected, effort)
    slimformer.unpatch(model)


@benchmark(
    "encode_gpu",
    needs="cuda",
    description="the same on a GPU, in float16 and bfloat16 (--model, --data)",
)
def run_on_gpu(settings: Settings) -> Iterator[Measurement]:
    """Errors are against the same weights in float32; the patched model may have a quarter more than the unpatched."""
    effort = Effort(milliseconds=5000.0, least=5, most=15, warm_ups=2)
    texts = corpora(settings)
    exact = embedder(settings)
    expected = {name: encode(exact, [found]) for name, found in texts.items()}
    for dtype_name, dtype in _DTYPES.items():
        model = embedder(settings).to(dtype)
        for name, found in texts.items():
            for calls in (ONE_CALL, ARRIVAL):
                yield from _compared(settings, model, name, found, calls, dtype_name, expected[name], effort)


def corpora(settings: Settings) -> dict[str, list[str]]:
    """Texts by the name of their collection, in the order of the files."""
    if settings.data is None:
        # Raises where the folder is needed.
        return {"lines": lines(settings, "wiki.test.raw")}
    queries = (settings.data / "qmsum_retrieval" / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "Cranfield, documents": read_retrieval(settings.data / "cranfield").texts,
        "QMSum, queries": [str(json.loads(line)["text"]) for line in queries],
        "WikiText-2, lines": lines(settings, "wiki.test.raw"),
    }


def encode(model: Any, calls: Sequence[list[str]]) -> Tensor:
    """Embeddings `[texts, hidden]` of all calls, in float32 on the CPU."""
    return torch.cat([torch.from_numpy(model.encode(call, batch_size=BATCH)).float() for call in calls])


def _compared(
    settings: Settings,
    model: Any,
    name: str,
    texts: list[str],
    calls: str,
    dtype: str,
    expected: Tensor,
    effort: Effort,
) -> list[Measurement]:
    whole = [texts] if calls == ONE_CALL else [texts[i : i + BATCH] for i in range(0, len(texts), BATCH)]
    run = partial(encode, model, whole)

    def case(prepare: Callable[[], object], tolerance: float) -> Case:
        def check() -> float:
            prepare()
            return relative_error(run(), expected)

        return Case(run, check, tolerance, prepare, None if tolerance == math.inf else DENSE)

    cases = {
        DENSE: case(partial(slimformer.unpatch, model), math.inf),
        LOSSLESS: case(partial(slimformer.patch, model), 1e-5),
    }
    return compare(
        settings,
        {"corpus": name, "texts": len(texts), "calls": calls, "dtype": dtype},
        cases,
        regime="wall",
        baseline=DENSE,
        effort=effort,
    )


def throughput(content: dict[str, Any]) -> str:
    """One row per corpus, kind of call and dtype: texts per second of all candidates, and their gain."""
    names = list(dict.fromkeys(measurement["candidate"] for measurement in content["measurements"]))
    rows = []
    for corpus, texts, calls, dtype in tables.points(
        content, "corpus", "texts", "calls", "dtype", where=lambda _: True
    ):
        cells = [f"{corpus}, {calls}" if dtype == "float32" else f"{corpus}, {calls}, {dtype}"]
        for name in names:
            found = tables.find(content, name, corpus=corpus, calls=calls, dtype=dtype)
            if found is None:
                cells.append("–")
                continue
            rate = tables.number(1000 * texts / found["milliseconds"]["p50"])
            cells.append(rate if name == DENSE else f"{rate} ({1 / found['baseline_ratio']:.2f}×)")
        rows.append(cells)
    return tables.markdown(["Texts per second", *names], rows)


for _source in ("encode_corpora", "encode_gpu"):
    table(_source, source=_source)(throughput)

"""sentence-transformers' `encode` unpatched, patched without a plan, and with early exits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
from slimformer import EarlyExit
from slimformer.model.anatomy import find_anatomy

DENSE, LOSSLESS = "unpatched", "slimformer.patch(model)"
BATCH = 32
_BATCHES = 4


@benchmark(
    "encode",
    needs="any",
    description="lines of WikiText-2 through encode: arrival order and one call, patched or not (--model, --data)",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Batches as a server gets them, one call each; then all texts in one call, which sorts them by length."""
    model = embedder(settings)
    texts = lines(settings, "wiki.test.raw")[: BATCH * settings.pick(_BATCHES, 1)]
    batches = [texts[start : start + BATCH] for start in range(0, len(texts), BATCH)]
    depth = len(find_anatomy(model).layers)
    for name, calls in (("batches in arrival order", batches), ("one call", [texts])):

        def encode(calls: list[list[str]] = calls) -> Tensor:
            found = [model.encode(call, batch_size=BATCH, convert_to_tensor=True) for call in calls]
            return torch.cat(found).cpu()

        slimformer.unpatch(model)
        expected = encode()
        cases = {
            DENSE: Case(encode, encode_error(encode, expected), math.inf, partial(slimformer.unpatch, model)),
            LOSSLESS: Case(encode, encode_error(encode, expected), 1e-5, partial(slimformer.patch, model)),
        }
        for layer in range(depth - 1, depth // 2 - 1, -1):
            method = EarlyExit(layer, _head_that_changes_nothing(model))
            cases[_exit(layer)] = Case(
                encode,
                encode_error(encode, _embeddings_at(model, layer, encode)),
                1e-5,
                partial(slimformer.patch, model, method),
            )
        yield from compare(
            settings,
            {"texts": len(texts), "calls": name},
            {key: _prepared(case) for key, case in cases.items()},
            regime="wall",
            baseline=DENSE,
            effort=Effort(milliseconds=60_000.0, least=7, most=15),
        )
    slimformer.unpatch(model)


def encode_error(encode: Callable[[], Tensor], expected: Tensor) -> Callable[[], float]:
    """A check that compares embeddings `[texts, dimensions]` with those expected."""
    return lambda: relative_error(encode(), expected)


def _prepared(case: Case) -> Case:
    """A case whose check patches the model as its timed calls do."""

    def check() -> float:
        if case.prepare is not None:
            case.prepare()
        return case.check()

    return Case(case.run, check, case.tolerance, case.prepare)


def _head_that_changes_nothing(model: Any) -> dict[str, Tensor]:
    """Costs what a fitted head costs."""
    hidden = find_anatomy(model).stack.config.hidden_size
    return {"head.weight": torch.zeros(hidden, hidden), "head.bias": torch.zeros(hidden)}


def _embeddings_at(model: Any, layer: int, encode: Callable[[], Tensor]) -> Tensor:
    """Embeddings of the unpatched model without the layers above, which are put back."""
    layers = find_anatomy(slimformer.unpatch(model)).layers
    above = list(layers[layer:])
    del layers[layer:]
    try:
        return encode()
    finally:
        layers.extend(above)


def _exit(layer: int) -> str:
    return f"exit at layer {layer}, head"


@table("encode", source="encode")
def throughput(content: dict[str, Any]) -> str:
    """Texts per second, and how many times those of the unpatched pipeline."""
    rows = []
    ways = tables.points(content, "calls", "texts", where=lambda _: True)
    names = dict.fromkeys(measurement["candidate"] for measurement in content["measurements"])
    for name in names:
        cells = []
        for calls, texts in ways:
            found = tables.find(content, name, calls=calls)
            if found is None:
                cells += ["–", "–"]
            else:
                rate = 1000 * texts / found["milliseconds"]["p50"]
                cells += [tables.number(rate), f"{1 / found['baseline_ratio']:.2f}×"]
        rows.append([name, *cells])
    head = [cell for calls, _ in ways for cell in (f"{calls}, texts per second", "gain")]
    return tables.markdown(["", *head], rows)

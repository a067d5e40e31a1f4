"""Small batches of encoders replayed from CUDA graphs give what float32 gives, and hold no memory when unpatched."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import slimformer
from gpu.plans import METHODS
from gpu.subjects import (
    DEVICE,
    DRY,
    DTYPES,
    ENCODERS,
    TOLERANCE,
    arguments,
    build,
    in_float32,
    moved,
    off,
    outputs,
)
from slimformer.changes.running_calls import PATCH
from slimformer.decoding import batching as batching_module
from slimformer.decoding import capture

NAMED = {method.name: method for method in METHODS}
# Each is called three times, behind which the next finds the graph: three texts of up to 96 tokens, in a graph of four.
LAYOUTS = [((0, 96), (0, 40), (0, 3)), ((0, 70), (0, 96), (0, 96)), ((10, 80), (0, 90), (86, 10))]


@pytest.fixture(autouse=True)
def where_it_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    if DRY:
        monkeypatch.setattr(capture, "_CAPTURES", {"cpu": lambda: True})


def batching(model: Any) -> Any:
    return next(vars(m)[PATCH] for m in model.modules() if PATCH in vars(m)).reports["batches"]


def told(model: Any) -> str:
    return str(slimformer.status(model).generation["batches"])


def run(model: Any, texts: tuple[tuple[int, int], ...], tokens: int = 96) -> Tensor:
    """Last hidden states, in inference mode as sentence-transformers calls."""
    with torch.inference_mode():
        return outputs(model, moved(arguments("bert", texts, tokens))).clone()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", ENCODERS)
def test_replayed_batches_give_what_float32_gives(name: str, dtype: torch.dtype) -> None:
    model = slimformer.patch(build(name, dtype, DEVICE))
    for texts in (*LAYOUTS, *LAYOUTS):
        mask = arguments(name, texts, 96)["attention_mask"]
        assert off(run(model, texts), in_float32(name, None, texts), mask) <= TOLERANCE[dtype], told(model)
    # Some versions of transformers make MPNet's relative positions on the CPU, which no graph can hold.
    if name != "mpnet" or "cannot be captured" not in told(model):
        assert (batching(model).batches, batching(model).captured) == (4, 1), told(model)


def test_with_layers_dropped_they_are_those_of_the_plan() -> None:
    method, dtype = NAMED["drop-mean"], torch.float16
    model = slimformer.patch(build("bert", dtype, DEVICE), *method.plan())
    for texts in (*LAYOUTS, *LAYOUTS):
        mask = arguments("bert", texts, 96)["attention_mask"]
        assert off(run(model, texts), in_float32("bert", method, texts), mask) <= TOLERANCE[dtype], told(
            model
        )
    assert batching(model).batches == 4, told(model)


def test_graphs_of_many_sizes_take_turns() -> None:
    dtype = torch.float16
    model = slimformer.patch(build("bert", dtype, DEVICE))
    sizes = [tuple((0, length) for length in (longest, 5, 9)) for longest in (20, 40, 70, 100, 150, 300)]
    for _ in range(4):
        for texts in sizes:
            tokens = max(length for _, length in texts)
            mask = arguments("bert", texts, tokens)["attention_mask"]
            found = run(model, texts, tokens)
            assert off(found, in_float32("bert", None, texts), mask) <= TOLERANCE[dtype], told(model)
    assert (batching(model).batches, batching(model).captured) == (12, 6), told(model)


@pytest.mark.skipif(DRY, reason="the CPU counts no memory")
def test_memory_does_not_grow_and_is_given_back() -> None:
    model = slimformer.patch(build("bert", torch.float16, DEVICE))
    run(model, LAYOUTS[0])
    before = allocated()
    for _ in range(3):
        run(model, LAYOUTS[0])
    first = allocated()
    for _ in range(50):
        run(model, LAYOUTS[1])
    assert batching(model).batches > 50, told(model)
    assert allocated() == first
    slimformer.unpatch(model)
    # What libraries keep for the stream of captures stays.
    assert allocated() <= before + 2**26


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def test_a_failed_capture_costs_that_model_its_graphs_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, texts = torch.float16, LAYOUTS[0]
    expected, mask = in_float32("bert", None, texts), arguments("bert", texts, 96)["attention_mask"]
    broken = slimformer.patch(build("bert", dtype, DEVICE))
    with monkeypatch.context() as failing:
        failing.setattr(batching_module, "preparing_a_batch", reading_the_device)
        for _ in range(4):
            assert off(run(broken, texts), expected, mask) <= TOLERANCE[dtype], told(broken)
    assert "cannot be captured" in told(broken), told(broken)
    model = slimformer.patch(build("bert", dtype, DEVICE))
    for _ in range(4):
        assert off(run(model, texts), expected, mask) <= TOLERANCE[dtype], told(model)
    assert batching(model).batches == 2, told(model)


@contextlib.contextmanager
def reading_the_device() -> Iterator[None]:
    """What no graph allows; on the CPU, which has none, an error as it comes then."""
    if DRY:
        raise RuntimeError("operation not permitted when stream is capturing")
    torch.ones(1, device=DEVICE).item()
    yield

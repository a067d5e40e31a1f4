"""CPU time of the row kernels' references: what runs where there is no GPU. `pytest benchmarks/micro`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import slimformer_kernels as kernels

TOKENS, HIDDEN, INTERMEDIATE = 1024, 576, 1536
CALLS: dict[str, Callable[[Tensor, Tensor | None, Tensor, Tensor], Tensor]] = {
    "rms_norm_rows": lambda x, rows, y, weight: kernels.rms_norm_rows(x, rows, weight, 1e-5),
    "layer_norm_rows": lambda x, rows, y, weight: kernels.layer_norm_rows(x, rows, weight, weight),
    "add_rows_": lambda x, rows, y, weight: kernels.add_rows_(x, rows, y),
    "add_rows_rms_norm_": lambda x, rows, y, weight: kernels.add_rows_rms_norm_(x, rows, y, weight, 1e-5),
}


@pytest.mark.parametrize("kept", [1.0, 0.5])
@pytest.mark.parametrize("name", CALLS)
def test_row_kernel(benchmark: BenchmarkFixture, name: str, kept: float) -> None:
    """A norm or a residual add of all rows, and of every second one."""
    benchmark.group = f"{name}, {TOKENS} x {HIDDEN}"
    x, weight = torch.randn(TOKENS, HIDDEN), torch.randn(HIDDEN)
    rows = None if kept == 1.0 else torch.arange(0, TOKENS, 2)
    y = torch.randn(TOKENS if rows is None else len(rows), HIDDEN)
    benchmark(CALLS[name], x, rows, y, weight)


@pytest.mark.parametrize("name", ["swiglu_packed", "geglu_packed"])
def test_gated_activation(benchmark: BenchmarkFixture, name: str) -> None:
    """A gated activation over the packed output of a gate_up product."""
    benchmark.group = f"gated activation, {TOKENS} x {INTERMEDIATE}"
    benchmark(getattr(kernels, name), torch.randn(TOKENS, 2 * INTERMEDIATE))

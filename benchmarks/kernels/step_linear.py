"""Linear layers of a decode step with what stands before and behind them: one launch against cuBLAS's and its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import slimformer_kernels as kernels
from benchmarks.frame import tables
from benchmarks.frame.compare import Case, compare, relative_error
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from benchmarks.frame.timing import Effort
from benchmarks.kernels.row_kernels import copy_bandwidth
from slimformer_kernels.step_linear import InputNorm
from slimformer_kernels.step_products import Tiling, launch_gated, launch_layers

LAUNCHED, KERNEL = "cuBLAS between kernels", "one kernel"
# hidden, intermediate, and the outputs of queries and keys.
_SHAPES = {"qwen-1.5b": (1536, 8960, 1536, 256), "llama-8b": (4096, 14336, 4096, 1024)}
_ROWS = (1, 4, 16)
# Behind each other, so that no weight is found in the cache.
_LEAST_BYTES, _MOST_COPIES = 256 << 20, 48
_OF_ONE_ROW = [
    Tiling(2, 1024), Tiling(4, 512, 1), Tiling(4, 512), Tiling(4, 1024), Tiling(8, 256, 4), Tiling(8, 512, 1),
    Tiling(8, 512), Tiling(8, 512, 3, 8), Tiling(8, 1024, 3, 8), Tiling(16, 256),
]  # fmt: skip
_OF_MORE = [
    Tiling(16, 128, 4), Tiling(16, 256), Tiling(16, 256, 4, 2), Tiling(32, 128, 4), Tiling(32, 128, 3, 8),
    Tiling(64, 64, 4),
]  # fmt: skip
_EPS = 1e-6


@benchmark(
    "step_linear", "linear layers of a step's few rows, each with its norm, activation or addition", on="GPU"
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Every layer of both shapes, by every tiling, from CUDA graphs."""
    bandwidth = copy_bandwidth(settings)
    yield bandwidth
    rate = bandwidth.values["bytes_per_ms"]
    for shape, sizes in settings.pick(_SHAPES, {"tiny": (24, 40, 24, 8)}).items():
        for rows in settings.pick(_ROWS, (1, 3)):
            for layers in _layers(settings, rows, *sizes):
                yield from layers.measured(settings, shape, rate)


class _Layers:
    """Many layers of a size, and two ways to compute them.

    Attributes:
        name: What they are.
        weights: Of every layer.
        launched: By the libraries' kernels.
        kernel: By one kernel, with a tiling.
    """

    def __init__(
        self,
        name: str,
        rows: int,
        weights: list[list[Tensor]],
        launched: Callable[[list[Tensor]], Tensor],
        kernel: Callable[[list[Tensor], Tiling], Tensor],
    ) -> None:
        self.name, self.rows, self.weights, self.launched, self.kernel = name, rows, weights, launched, kernel

    def measured(self, settings: Settings, shape: str, rate: float) -> Iterator[Measurement]:
        """All tilings beside what they replace, times per layer."""
        wide = self.launched([t.float() for t in self.weights[0]])

        def case(call: Callable[[list[Tensor]], Tensor]) -> Case:
            def run() -> None:
                for own in self.weights:
                    call(own)

            return Case(run, lambda: relative_error(call(self.weights[0]), wide), settings.tolerance)

        def tiled(tiling: Tiling) -> Case:
            return case(lambda own: self.kernel(own, tiling))

        tilings = _OF_ONE_ROW if self.rows == 1 else _OF_MORE
        cases = {LAUNCHED: case(self.launched)}
        for tiling in settings.pick(tilings, tilings[:1]):
            cases[f"{KERNEL}, {'x'.join(map(str, tiling))}"] = tiled(tiling)
        size = sum(t.numel() * t.element_size() for own in self.weights for t in own)
        count = len(self.weights)
        yield from compare(
            settings,
            {"layer": self.name, "shape": shape, "rows": self.rows},
            cases,
            regime="graph" if settings.on_gpu else "eager",
            baseline=LAUNCHED,
            # A copy reads and writes; half of its bytes are read.
            ideal=lambda name, medians: size / rate,
            values=lambda medians: {name: {"us_per_layer": 1e3 * ms / count} for name, ms in medians.items()},
            effort=Effort(milliseconds=60.0, least=10, most=40),
        )


def _layers(
    settings: Settings, rows: int, hidden: int, intermediate: int, queries: int, keys: int
) -> Iterator[_Layers]:
    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=settings.device, dtype=settings.dtype)

    def copies(*sizes: tuple[int, int]) -> list[list[Tensor]]:
        each = sum(a * b for a, b in sizes) * torch.finfo(settings.dtype).bits // 8
        count = settings.pick(min(max(_LEAST_BYTES // each, 4), _MOST_COPIES), 2)
        return [[random(*size) * size[1] ** -0.5 for size in sizes] for _ in range(count)]

    x, residual, inner = random(rows, hidden), random(rows, hidden), random(rows, intermediate)
    heads = random(rows, queries)
    norm = InputNorm(1 + 0.1 * random(hidden), _EPS)

    def of_norm(own: list[Tensor]) -> Tensor:
        like = own[0]
        return kernels.rms_norm_rows(x.to(like), None, norm.weight.to(like), _EPS)

    def projected(own: list[Tensor]) -> Tensor:
        h = of_norm(own)
        found = [F.linear(h, w) for w in own]
        # As a model has them: each by itself, never put together.
        return found[0] if _is_captured(settings) else torch.cat(found, 1)

    def projected_at_once(own: list[Tensor], tiling: Tiling) -> Tensor:
        if not settings.on_gpu:
            return kernels.step_linear(x, [(w, None) for w in own], norm)
        out = x.new_empty(rows, sum(len(w) for w in own))
        launch_layers(x, norm.weight, _EPS, 0.0, [(w, None) for w in own], out, None, tiling)
        return out

    def gated(own: list[Tensor]) -> Tensor:
        h = of_norm(own)
        return kernels.swiglu(F.linear(h, own[0]), F.linear(h, own[1]))

    def gated_at_once(own: list[Tensor], tiling: Tiling) -> Tensor:
        if not settings.on_gpu:
            return kernels.step_gated(x, own[0], own[1], "silu", norm)
        return launch_gated(x, norm.weight, _EPS, 0.0, own[0], own[1], "silu", tiling)

    def added(y: Tensor) -> tuple[Callable[[list[Tensor]], Tensor], Callable[[list[Tensor], Tiling], Tensor]]:
        def launched(own: list[Tensor]) -> Tensor:
            return torch.addmm(residual.to(own[0]), y.to(own[0]), own[0].T)

        def at_once(own: list[Tensor], tiling: Tiling) -> Tensor:
            if not settings.on_gpu:
                return kernels.step_linear_added(residual, y, own[0])
            out = torch.empty_like(residual)
            launch_layers(y, None, 0.0, 0.0, [(own[0], None), *[(None, None)] * 2], out, residual, tiling)
            return out

        return launched, at_once

    yield _Layers(
        "queries, keys, values",
        rows,
        copies((queries, hidden), (keys, hidden), (keys, hidden)),
        projected,
        projected_at_once,
    )
    yield _Layers("attention output", rows, copies((hidden, queries)), *added(heads))
    yield _Layers(
        "gate and up", rows, copies((intermediate, hidden), (intermediate, hidden)), gated, gated_at_once
    )
    yield _Layers("down", rows, copies((hidden, intermediate)), *added(inner))


def _is_captured(settings: Settings) -> bool:
    return settings.on_gpu and torch.cuda.is_current_stream_capturing()


@table("step_linear")
def tilings(content: dict[str, Any]) -> str:
    """Microseconds of every layer, launched as before and by the fastest tiling."""
    rows = []
    for at in tables.points(content, "shape", "rows", "layer", where=lambda p: "layer" in p):
        launched = tables.find(content, LAUNCHED, **at)
        found = [
            m
            for m in content["measurements"]
            if m["status"] == "ok"
            and m["candidate"].startswith(KERNEL)
            and all(m["parameters"].get(k) == v for k, v in at.items())
        ]
        if launched is None or not found:
            continue
        best = min(found, key=lambda m: m["milliseconds"]["p50"])
        rows.append(
            [
                f"{at['shape']}, {at['rows']} rows, {at['layer']}",
                f"{launched['values']['us_per_layer']:.1f}",
                f"{best['values']['us_per_layer']:.1f}",
                best["candidate"].removeprefix(f"{KERNEL}, "),
                f"{best['ideal_ratio']:.2f}",
            ]
        )
    head = ["", "launched, µs", "one kernel, µs", "tiling", "of ideal"]
    return tables.markdown(head, rows) if rows else ""

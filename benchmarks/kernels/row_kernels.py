"""The row kernels one by one: bytes over bandwidth is what they can reach, eager operations what they replace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import slimformer_kernels as kernels
from benchmarks.frame import tables
from benchmarks.frame.compare import Case, compare, relative_error
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.frame.timing import Candidate, Effort, interleaved
from benchmarks.kernels.mlp_rows import SHAPES, TOKENS, random_rows
from slimformer_kernels.add_rows import add_rows_reference
from slimformer_kernels.glu import glu_reference
from slimformer_kernels.layer_norm_rows import layer_norm_rows_reference
from slimformer_kernels.rms_norm_rows import rms_norm_rows_reference

KERNEL, EAGER = "kernel", "eager HF"
KEEPS = (1.0, 0.5)
_EPS = 1e-5
_COPY_BYTES = 1 << 30

Output = Tensor | tuple[Tensor, ...]


@benchmark(
    "row_kernels",
    "norms with gather, residual adds with scatter and gated activations against device copy bandwidth",
    on="GPU",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Measure the copy bandwidth first, then every kernel at every shape and token count."""
    bandwidth = copy_bandwidth(settings)
    yield bandwidth
    rate = bandwidth.values["bytes_per_ms"]
    for shape, (hidden, intermediate) in settings.pick(SHAPES, {"tiny": (24, 40)}).items():
        for tokens in settings.pick(TOKENS, (33,)):
            for keep in KEEPS:
                yield from _row_operations(settings, shape, tokens, hidden, keep, rate)
            yield from _activations(settings, shape, tokens, intermediate, rate)


def copy_bandwidth(settings: Settings) -> Measurement:
    """Time a copy on the device: bytes read plus bytes written."""
    size = settings.pick(_COPY_BYTES, 1 << 16)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    if not torch.equal(target.copy_(source), source):
        raise RuntimeError("the device copied wrongly")
    effort = settings.pick(Effort(), Effort(0.0, 2, 2))
    copies = {"device copy": Candidate(lambda: target.copy_(source))}
    timing = interleaved(copies, settings.device, regime="eager", effort=effort)["device copy"]
    return Measurement(
        {"kernel": "copy", "bytes": 2 * size},
        "device copy",
        milliseconds=timing,
        error=0.0,
        values={"bytes_per_ms": 2 * size / timing.p50},
    )


def _row_operations(
    settings: Settings, shape: str, tokens: int, hidden: int, keep: float, rate: float
) -> Iterator[Measurement]:
    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=settings.device, dtype=settings.dtype)

    count = round(keep * tokens)
    rows = None if keep == 1.0 else random_rows(tokens, count, settings.device)
    start, y, bias = random(tokens, hidden), random(count, hidden), random(hidden)
    weight = 1 + 0.1 * random(hidden)
    rms, layer = _modules(settings, hidden, weight, bias)
    x, residual, added = start.clone(), start.clone(), start.clone()
    pass_bytes = count * hidden * start.element_size()

    def kept(from_: Tensor) -> Tensor:
        return from_ if rows is None else from_.index_select(0, rows)

    def eager_add(to: Tensor) -> Tensor:
        if rows is None:
            return to + y
        return to.index_copy_(0, rows, to.index_select(0, rows) + y)

    # The references see float32, so that their own rounding is not counted.
    wide = start.float()
    sum_ = add_rows_reference(wide.clone(), rows, y.float())
    normed = rms_norm_rows_reference(kept(sum_), None, weight.float(), _EPS, 0.0, False)
    operations: dict[str, tuple[int, Callable[[], Output], Callable[[], Output], tuple[Tensor, ...]]] = {
        "rms_norm_rows": (
            2,
            lambda: kernels.rms_norm_rows(x, rows, weight, _EPS),
            lambda: rms(kept(x)),
            (rms_norm_rows_reference(wide, rows, weight.float(), _EPS, 0.0, False),),
        ),
        "layer_norm_rows": (
            2,
            lambda: kernels.layer_norm_rows(x, rows, weight, bias, _EPS),
            lambda: layer(kept(x)),
            (layer_norm_rows_reference(wide, rows, weight.float(), bias.float(), _EPS),),
        ),
        "add_rows_": (3, lambda: kernels.add_rows_(residual, rows, y), lambda: eager_add(added), (sum_,)),
        "add_rows_rms_norm_": (
            4,
            lambda: (kernels.add_rows_rms_norm_(residual, rows, y, weight, _EPS), residual),
            lambda: (rms(kept(total := eager_add(added))), total),
            (normed, sum_),
        ),
    }

    def reset() -> None:
        residual.copy_(start)
        added.copy_(start)

    for name, (passes, call, eager, expected) in operations.items():
        at = _point(name, shape, tokens, hidden, keep)
        yield from _compared(settings, at, call, eager, expected, reset, passes * pass_bytes / rate)


def _activations(
    settings: Settings, shape: str, tokens: int, intermediate: int, rate: float
) -> Iterator[Measurement]:
    packed = torch.randn(tokens, 2 * intermediate, device=settings.device, dtype=settings.dtype)
    gate, up = packed.chunk(2, dim=-1)
    operations: dict[str, tuple[Callable[[], Output], Callable[[], Output], str]] = {
        "swiglu": (lambda: kernels.swiglu(gate, up), lambda: F.silu(gate) * up, "silu"),
        "geglu": (
            lambda: kernels.geglu(gate, up),
            lambda: F.gelu(gate, approximate="tanh") * up,
            "gelu_tanh",
        ),
    }
    ideal = 3 * gate.numel() * packed.element_size() / rate
    for name, (call, eager, activation) in operations.items():
        expected = glu_reference(gate.float(), up.float(), activation)
        at = _point(name, shape, tokens, intermediate, 1.0)
        yield from _compared(settings, at, call, eager, (expected,), lambda: None, ideal)


def _point(kernel: str, shape: str, tokens: int, width: int, keep: float) -> Parameters:
    return {"kernel": kernel, "shape": shape, "tokens": tokens, "width": width, "keep": keep}


def _compared(
    settings: Settings,
    parameters: Parameters,
    call: Callable[[], Output],
    eager: Callable[[], Output],
    expected: tuple[Tensor, ...],
    reset: Callable[[], None],
    ideal: float,
) -> Iterator[Measurement]:
    def case(run: Callable[[], Output]) -> Case:
        def check() -> float:
            reset()
            got = run()
            outputs = (got,) if isinstance(got, Tensor) else got
            return torch.tensor(list(map(relative_error, outputs, expected))).max().item()

        return Case(run, check, settings.tolerance)

    yield from compare(
        settings,
        parameters,
        {EAGER: case(eager), KERNEL: case(call)},
        regime="eager",
        baseline=EAGER,
        ideal=lambda name, medians: ideal,
        values=lambda medians: {KERNEL: {"ideal_ms": ideal}},
        effort=Effort(milliseconds=100.0, least=20, most=100),
    )


def _modules(settings: Settings, hidden: int, weight: Tensor, bias: Tensor) -> tuple[nn.Module, nn.Module]:
    with torch.device("meta"):
        rms, layer = LlamaRMSNorm(hidden, eps=_EPS), nn.LayerNorm(hidden, eps=_EPS)
    rms.weight = layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return rms, layer


@table("row_kernels")
def bandwidths(content: dict[str, Any]) -> str:
    """Time over bytes / bandwidth, and how many times faster than the eager operations."""
    copy = tables.find(content, "device copy", kernel="copy")
    rate = "–" if copy is None else f"{copy['values']['bytes_per_ms'] / 1e9:.2f} TB/s"
    rows = [
        (f"`{at['kernel']}`, {at['shape']}, {at['keep']:.0%} of the rows", at)
        for at in tables.points(content, "kernel", "keep", "shape", where=_has_tokens)
    ]
    columns: list[tuple[str, dict[str, Any], tables.Cell]] = []
    for tokens in sorted(tables.distinct(content, "tokens", where=_has_tokens)):
        at = {"candidate": KERNEL, "tokens": tokens}
        columns.append((f"{tokens} tokens, ms", at, tables.milliseconds))
        columns.append(("of ideal", at, lambda found: tables.ratio(found, "ideal_ratio")))
        columns.append(("faster than eager", at, lambda found: tables.gain(found, ".1f")))
    return tables.grid(content, f"Device copy {rate}", rows, columns)


def _has_tokens(parameters: dict[str, Any]) -> bool:
    return "tokens" in parameters

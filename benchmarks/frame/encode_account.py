"""Where the time of `encode` goes: tokenising, the CPU in the model, the GPU, and what the hardware needs at best."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from slimformer.model.anatomy import find_anatomy


@dataclass(frozen=True)
class Rates:
    """What a device reaches with one large call of the simplest kind, in the dtype that is measured.

    Attributes:
        flops: Of a matrix product, per second.
        bytes: Read and written by a copy, per second.
    """

    flops: float
    bytes: float

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype, size: int) -> Rates:
        """Measured with square matrices `[size, size]`, and with vectors of 16 times as many numbers."""
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        source = torch.zeros(16 * size * size, dtype=dtype, device=device)
        target = torch.empty_like(source)
        product = _fastest(lambda: left @ right, device)
        copy = _fastest(lambda: target.copy_(source), device)
        return Rates(2 * size**3 / product, 2 * source.numel() * source.element_size() / copy)


def _fastest(call: Callable[[], object], device: torch.device, calls: int = 10) -> float:
    """Seconds of the fastest of a few calls."""
    times = []
    for _ in range(calls):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Work:
    """What has to be multiplied and moved for some texts without padding, pooling left out.

    Attributes:
        tokens: With the special ones, after truncation.
        flops: Of linear layers and of attention.
        weights: Bytes of the linear layers, read once per batch.
        activations: Bytes that linear layers read and write.
    """

    tokens: int
    flops: float
    weights: float
    activations: float

    @staticmethod
    def of(pipeline: Any, texts: Sequence[str]) -> Work:
        """What an embedding pipeline computes for texts."""
        limit = pipeline.max_seq_length
        # transformers' own warning about long texts would be about what is cut off here.
        ids = pipeline.tokenizer(list(texts), truncation=limit is not None, max_length=limit)["input_ids"]
        lengths = torch.tensor([len(text) for text in ids], dtype=torch.float64)
        anatomy = find_anatomy(pipeline)
        linear = [m.weight for layer in anatomy.layers for m in layer.modules() if isinstance(m, nn.Linear)]
        size, hidden = linear[0].element_size(), anatomy.stack.config.hidden_size
        tokens = int(lengths.sum())
        # Queries times keys and scores times values, each a multiplication and an addition.
        attention = 4 * hidden * len(anatomy.layers) * float(lengths.square().sum())
        return Work(
            tokens,
            2 * tokens * sum(weight.numel() for weight in linear) + attention,
            float(size * sum(weight.numel() for weight in linear)),
            float(size * tokens * sum(sum(weight.shape) for weight in linear)),
        )

    def bytes(self, batches: int) -> float:
        """What is moved in so many batches."""
        return self.weights * batches + self.activations

    def milliseconds(self, rates: Rates, batches: int) -> float:
        """What it takes at best: the longer of multiplying and moving."""
        return 1e3 * max(self.flops / rates.flops, self.bytes(batches) / rates.bytes)


def account(
    pipeline: Any, encode: Callable[[], object], work: Work, rates: Rates, device: torch.device
) -> dict[str, float]:
    """Figures of one `encode`, each taken in a run of its own so that none is part of another.

    Args:
        pipeline: What encodes.
        encode: One run over the texts.
        work: What they need.
        rates: What the device reaches.
        device: Where the model lies.

    Returns:
        Milliseconds in which the CPU makes token ids, and in which it is in the model, which it leaves while the GPU
        still computes; batches; what multiplying and moving need at the device's own rates; and on a GPU the
        milliseconds from the first kernel of a batch to its last, those in which something runs, and how many kernels
        and copies that is.
    """
    on_gpu = device.type == "cuda"
    with _timed(pipeline, "preprocess") as tokenising, _timed(pipeline, "forward", on_gpu) as forward:
        encode()
    _wait(device)
    batches = forward.count
    found = {
        "tokens": float(work.tokens),
        "batches": float(batches),
        "TFLOPs": work.flops / 1e12,
        "GB at least": work.bytes(batches) / 1e9,
        "TFLOP/s of a matrix product": rates.flops / 1e12,
        "GB/s of a copy": rates.bytes / 1e9,
        "multiplying, ms": 1e3 * work.flops / rates.flops,
        "moving, ms": 1e3 * work.bytes(batches) / rates.bytes,
        "tokenising, ms": 1e3 * tokenising.seconds,
        "CPU in the model, ms": 1e3 * forward.seconds,
    }
    if on_gpu:
        found["GPU in the model, ms"] = sum(start.elapsed_time(end) for start, end in forward.events)
        busy, launches = _on_the_gpu(encode)
        # Where the driver lets nobody look, nothing is known of it.
        found |= {"GPU busy, ms": busy, "kernels and copies": float(launches)} if launches else {}
    return found


@dataclass
class _Calls:
    """Calls of a method: how long the CPU was in them, how many they were, and where they begin and end on the GPU."""

    seconds: float = 0.0
    count: int = 0
    events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)


@contextlib.contextmanager
def _timed(module: nn.Module, name: str, on_gpu: bool = False) -> Iterator[_Calls]:
    """A block in which calls of a module's method are noted."""
    own, calls = getattr(module, name), _Calls()

    def timed(*args: Any, **options: Any) -> Any:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
        if marks:
            marks[0].record()
        start = time.perf_counter()
        try:
            return own(*args, **options)
        finally:
            calls.seconds += time.perf_counter() - start
            calls.count += 1
            if marks:
                marks[1].record()
                calls.events.append((marks[0], marks[1]))

    before = module.__dict__.get(name)
    module.__dict__[name] = timed
    try:
        yield calls
    finally:
        if before is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def _on_the_gpu(encode: Callable[[], object]) -> tuple[float, int]:
    """Milliseconds in which kernels or copies run, and how many of them there are."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        encode()
        torch.cuda.synchronize()
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiled.events()
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    )
    busy, until = 0.0, float("-inf")
    for start, end in ranges:
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy / 1e3, len(ranges)


def rest(values: Mapping[str, float], milliseconds: float) -> dict[str, float]:
    """What of a whole run's median is neither tokenising nor the CPU in the model: sorting, copying, waiting.

    Args:
        values: From `account`.
        milliseconds: The median.
    """
    known = values["tokenising, ms"] + values["CPU in the model, ms"]
    # Both come from another run than the median, which may have been the faster one.
    return {"elsewhere, ms": max(0.0, milliseconds - known)}

"""Times of several candidates, taken in turns so that whatever slows the machine down meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.frame.results import Timing

# eager     as triton.testing.do_bench: caches flushed before every call, launches queued behind the flush
# graph     the same with the launches replayed from a CUDA graph: the GPU's own time
# in a row  ten calls behind each other: the larger of the time to launch and the time to run, as inside a model
# wall      one call on an idle GPU, until its last kernel is done
# queued    one call behind 40 milliseconds of other work, which hide what the CPU does first
# processor what all threads of this process take of a CPU, whoever else runs there
Regime = Literal["eager", "graph", "in a row", "wall", "processor", "queued"]

_CALLS_IN_A_ROW = 10
# More than the 50 MB of an H100's L2, so that it holds nothing of the last call.
_FLUSH_BYTES = 256 << 20
_FLUSHES = {"eager": 1, "graph": 1, "in a row": 0, "wall": 0, "processor": 0, "queued": 400}
_WARM_UPS = 3


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        run: One call.
        prepare: Done before every timed call, outside the time.
    """

    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True)
class Effort:
    """How long to measure: as many rounds as fit in `milliseconds`, within the bounds, after `warm_ups` calls each."""

    milliseconds: float = 1500.0
    least: int = 10
    most: int = 60
    warm_ups: int = _WARM_UPS


def interleaved(
    candidates: Mapping[str, Candidate], device: torch.device, *, regime: Regime, effort: Effort
) -> dict[str, Timing]:
    """Time every candidate once per round; the one that starts changes from round to round."""
    names = list(candidates)
    if not names:
        return {}
    calls = {name: _call(candidate, regime, device) for name, candidate in candidates.items()}
    for candidate in calls.values():
        for _ in range(effort.warm_ups):
            _prepare(candidate)
            candidate.run()
    stopwatch = _Cuda(device, regime) if device.type == "cuda" else _Cpu(regime)
    for name in names:
        stopwatch.measure(name, calls[name])
    round_milliseconds = sum(values[0] for values in stopwatch.collect().values())
    rounds = min(max(int(effort.milliseconds / max(round_milliseconds, 1e-6)), effort.least), effort.most)
    for index in range(rounds):
        start = index % len(names)
        for name in names[start:] + names[:start]:
            stopwatch.measure(name, calls[name])
    per_call = _CALLS_IN_A_ROW if regime == "in a row" else 1
    return {name: _percentiles(values, per_call) for name, values in stopwatch.collect().items()}


def cuda_graph(run: Callable[[], object]) -> Callable[[], object]:
    """Capture the launches of `run`, and return the function that replays them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class _Cuda:
    """Pairs of events, read when all are through."""

    def __init__(self, device: torch.device, regime: Regime):
        self.flushes = _FLUSHES[regime]
        self.buffer = torch.empty(_FLUSH_BYTES if self.flushes else 0, dtype=torch.uint8, device=device)
        self.events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def measure(self, name: str, candidate: Candidate) -> None:
        _prepare(candidate)
        if not self.flushes:
            torch.cuda.synchronize()
        for _ in range(self.flushes):
            self.buffer.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        candidate.run()
        end.record()
        self.events.append((name, start, end))

    def collect(self) -> dict[str, list[float]]:
        torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for name, start, end in self.events:
            found.setdefault(name, []).append(start.elapsed_time(end))
        self.events = []
        return found


class _Cpu:
    """A host clock."""

    def __init__(self, regime: Regime) -> None:
        self.now = time.process_time_ns if regime == "processor" else time.perf_counter_ns
        self.times: dict[str, list[float]] = {}

    def measure(self, name: str, candidate: Candidate) -> None:
        _prepare(candidate)
        start = self.now()
        candidate.run()
        self.times.setdefault(name, []).append((self.now() - start) / 1e6)

    def collect(self) -> dict[str, list[float]]:
        found, self.times = self.times, {}
        return found


def _prepare(candidate: Candidate) -> None:
    if candidate.prepare is not None:
        candidate.prepare()


def _call(candidate: Candidate, regime: Regime, device: torch.device) -> Candidate:
    """What one timed call of the regime consists of."""
    run = candidate.run
    if regime == "graph" and device.type == "cuda":
        _prepare(candidate)
        return Candidate(cuda_graph(run), candidate.prepare)
    if regime != "in a row":
        return candidate

    def row() -> None:
        for _ in range(_CALLS_IN_A_ROW):
            run()

    return Candidate(row, candidate.prepare)


def _percentiles(milliseconds: list[float], per_call: int) -> Timing:
    levels = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = (torch.tensor(milliseconds, dtype=torch.float64) / per_call).quantile(levels).tolist()
    return Timing(p20, p50, p80, len(milliseconds))

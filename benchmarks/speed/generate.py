"""`generate` end to end: a token's time eager, from our graphs, and by what else makes it faster."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

import torch

import slimformer
from benchmarks.frame import tables
from benchmarks.frame.compare import Unsupported, relative_error, release
from benchmarks.frame.inputs import LOSSLESS, UNPATCHED
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Timing, reason
from benchmarks.speed import generators
from benchmarks.speed.generators import ALONE, BESIDE_EACH_OTHER, Times
from benchmarks.speed.llamas import with_shared_weights

_REPEATS = 3
# A step in bfloat16 beside another right one, on random weights.
_TOLERANCE = 0.1
_POINTS = {
    "qwen-1.5b": ((1, 512), (1, 4096), (1, 16384), (4, 512), (4, 4096), (16, 512), (16, 4096)),
    "llama-8b": ((1, 512), (1, 4096), (1, 16384), (4, 512), (16, 512)),
}
# Where everything else is measured too, in processes of their own.
_COMPARED = (1, 512)


@benchmark(
    "generate",
    "milliseconds per token of `generate`, and of the first call: eager, the patch, compiled static cache, Liger, "
    "kernels of the Hub",
    on="any",
    parts=("qwen", "8b", "others"),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Both shapes, at every batch and prompt that fits in the time and memory of a run."""
    rate = _read_rate(settings)
    for shape, points in _POINTS.items():
        if settings.only not in (None, "others") and str(settings.only) not in shape:
            continue
        model = generators.seeded(shape, settings)
        ready = {name: generators.made(name, with_shared_weights(model)) for name in BESIDE_EACH_OTHER}
        for batch, tokens in settings.pick(points, ((1, 24), (2, 24))):
            compared = (batch, tokens) == settings.pick(_COMPARED, (1, 24))
            if settings.only == "others" and not compared:
                continue
            point = _Point(settings, shape, batch, tokens)
            found = point.beside_each_other(ready)
            if compared and settings.only in (None, "others"):
                # One is enough to try how they are called.
                found |= point.alone(settings.pick(ALONE, ALONE[:1] if shape.startswith("qwen") else ()))
            best = _bytes_read(model, batch, tokens) / rate * 1e3
            yield from _judged(point, found, best, ready[LOSSLESS][0])
        del model, ready
        gc.collect()
        release()


class _Point:
    """One shape at one size: what every way to generate takes there, or why it is not known."""

    def __init__(self, settings: Settings, shape: str, batch: int, tokens: int) -> None:
        self.settings, self.repeats = settings, settings.pick(_REPEATS, 1)
        self.asked = (shape, batch, tokens)
        self.parameters: Mapping[str, Any] = {"shape": shape, "batch": batch, "tokens": tokens}

    def beside_each_other(self, ready: Mapping[str, tuple[Any, Any]]) -> dict[str, Times | Exception]:
        """In turns, in this process."""
        found: dict[str, Times | Exception] = {}
        ids = generators.prompts(ready[UNPATCHED][0], *self.asked[1:])
        for name, (model, options) in ready.items():
            try:
                found[name] = generators.first(self.settings, model, ids, options)
            except Exception as failure:
                found[name] = failure
                release()
        for _ in range(self.repeats):
            for name, (model, options) in ready.items():
                times = found[name]
                if not isinstance(times, Times):
                    continue
                try:
                    times.milliseconds.append(generators.timed(self.settings, model, ids, options))
                except Exception as failure:
                    found[name] = failure
                    release()
        return found

    def alone(self, names: tuple[str, ...]) -> dict[str, Times | Exception]:
        """Each in a process of its own."""
        found: dict[str, Times | Exception] = {}
        release()
        for name in names:
            try:
                found[name] = generators.in_its_own_process(self.settings, name, *self.asked, self.repeats)
            except Exception as failure:
                found[name] = failure
        return found


def _judged(
    point: _Point, found: Mapping[str, Times | Exception], best: float, patched: Any
) -> Iterator[Measurement]:
    """What was found, as far as it computed the same as the unpatched model."""
    dense = found[UNPATCHED]
    for name, times in found.items():
        if isinstance(times, Exception):
            state = "unsupported" if isinstance(times, Unsupported) else "failed"
            yield Measurement(point.parameters, name, status=state, note=str(times) or reason(times))
            continue
        error = relative_error(times.logits, dense.logits) if isinstance(dense, Times) else None
        if error is not None and not error <= _TOLERANCE:
            far = f"relative error {error:.3g}"
            yield Measurement(point.parameters, name, status="wrong", error=error, note=far)
            continue
        rounds = sorted(times.milliseconds)
        if rounds[0] <= 0:
            lost = "many tokens took no longer than few: the time of the prompt varies by more than they take"
            yield Measurement(point.parameters, name, status="failed", note=lost)
            continue
        middle = median(rounds)
        values = {"first_call_seconds": times.first_call, "milliseconds_to_read": best}
        if name == LOSSLESS:
            values |= _of_step(patched)
        yield Measurement(
            point.parameters,
            name,
            milliseconds=Timing(rounds[0], middle, rounds[-1], len(rounds)),
            baseline_ratio=middle / median(dense.milliseconds) if isinstance(dense, Times) else None,
            ideal_ratio=middle / best,
            error=error,
            values=values,
            note=slimformer.status(patched).generation.get("steps", "") if name == LOSSLESS else "",
        )


def _of_step(model: Any) -> dict[str, float]:
    """The GPU's own time of the last captured step."""
    from slimformer.changes.running_calls import PATCH  # noqa: PLC0415

    patch = next(vars(module)[PATCH] for module in model.modules() if PATCH in vars(module))
    stepping = patch.reports.get("steps")
    rooms = [] if stepping is None else [room for room in stepping.rooms.free if room.graphs]
    if not rooms or not torch.cuda.is_available():
        return {}
    room = rooms[-1]
    graph = next(graph for (_, width), graph in room.graphs.items() if width == 1)
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.step.first.fill_(max(int(room.at) - 1, 0))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    room.at = -1
    return {"step_on_gpu_ms": median(times), "room": float(room.count)}


def _bytes_read(model: Any, batch: int, tokens: int) -> float:
    """What one step has to read: every weight but the embeddings of other tokens, and the keys and values."""
    tied = model.config.tie_word_embeddings
    embedding = model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    weights -= 0 if tied else embedding.numel() * embedding.element_size()
    config = model.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    keys = (
        2
        * config.num_hidden_layers
        * width
        * embedding.element_size()
        * (batch * (tokens + generators.LONG // 2))
    )
    return float(weights + keys)


def _read_rate(settings: Settings) -> float:
    """Bytes per second that the device reads, measured with a sum over more than any cache holds."""
    numbers = torch.ones(settings.pick(2**30, 2**16), dtype=torch.int32, device=settings.device)
    times = []
    for _ in range(6):
        generators.wait(settings)
        begun = time.perf_counter()
        numbers.amax()
        generators.wait(settings)
        times.append(time.perf_counter() - begun)
    return numbers.numel() * 4 / min(times)


@table("generate")
def token_by_token(content: dict[str, Any]) -> str:
    """Milliseconds per token of both, and how far the patch is from what reading the weights takes."""
    rows = []
    for at in tables.points(content, "shape", "batch", "tokens"):
        dense, slim = (tables.find(content, name, **at) for name in (UNPATCHED, LOSSLESS))
        if dense is None or slim is None:
            continue
        rows.append(
            [
                f"{at['shape']}, batch {at['batch']}, prompt of {at['tokens']}",
                f"{dense['milliseconds']['p50']:.1f}",
                f"{slim['milliseconds']['p50']:.2f}",
                f"{1 / slim['baseline_ratio']:.1f}×",
                tables.shown(slim["values"].get("step_on_gpu_ms"), ".2f"),
                f"{slim['values']['milliseconds_to_read']:.2f}",
                f"{slim['values']['first_call_seconds']:.1f}",
            ]
        )
    head = [
        "",
        "unpatched, ms",
        "patched, ms",
        "faster",
        "step on the GPU, ms",
        "to read, ms",
        "first call, s",
    ]
    return tables.markdown(head, rows) if rows else ""


@table("generate_others", source="generate")
def other_ways(content: dict[str, Any]) -> str:
    """Milliseconds per token and the first call of every way, where all were measured."""
    rows = []
    for at in tables.points(content, "shape", "batch", "tokens"):
        ways = {name: tables.find(content, name, **at) for name in (*BESIDE_EACH_OTHER, *ALONE)}
        if not any(ways[name] for name in ALONE):
            continue
        for name, way in ways.items():
            if way is not None:
                rows.append(
                    [
                        f"{at['shape']}, {name}",
                        f"{way['milliseconds']['p50']:.2f}",
                        f"{way['values']['first_call_seconds']:.1f}",
                    ]
                )
    return tables.markdown(["", "a token, ms", "first call, s"], rows) if rows else ""

"""Half of the attentions of an 8B model dropped: the time saved beside the time of what was dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, StaticCache

from benchmarks.frame import tables
from benchmarks.frame.compare import Medians, against, compare, release
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.frame.timing import Effort, Regime
from benchmarks.speed.llamas import DENSE, SLIM, SUBLAYERS, DenseAndSlim, rewinder, sublayers_in_float32
from slimformer.evaluation.timing.speed import cache_bytes

PROMPT = 2048
BATCHES = (1, 16)
# Room in a static cache behind the prompt.
_ROOM = 128
# Eager launches take longer than what they launch where the CPU is slow: once what a user waits, once the GPU's part.
_REGIMES: tuple[Regime, ...] = ("queued", "wall")
# Of 16 attentions one behind the other, which have no dense model beside them as a yardstick.
_SUBLAYERS_TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
Call = Callable[..., Any]


@benchmark(
    "layer_drop",
    "prefill and eager decode of an 8B shape, dense and with 16 of 32 attentions dropped",
    on="GPU",
)
def eager(settings: Settings) -> Iterator[Measurement]:
    """Prefill at two lengths, then decode steps on filled caches."""
    models = DenseAndSlim(settings)
    for tokens in settings.pick((2048, 16384), (24,)):
        yield from _prefill(settings, models, tokens)
        release()
    for batch in BATCHES:
        yield from _decode(settings, models, batch, compiled=False)


@benchmark(
    "layer_drop_compiled",
    "decode of an 8B shape with a static cache under torch.compile, dense and with 16 attentions dropped",
    on="GPU",
)
def with_cuda_graphs(settings: Settings) -> Iterator[Measurement]:
    """Compile the dense model, the slim one and the dropped sublayers for each batch size."""
    models = DenseAndSlim(settings)
    for batch in BATCHES:
        # Frees the graphs of the batch size before.
        torch.compiler.reset()
        yield from _decode(settings, models, batch, compiled=True)


def _prefill(settings: Settings, models: DenseAndSlim, tokens: int) -> Iterator[Measurement]:
    ids, h, rotary = models.tokens(1, tokens), models.hidden(1, tokens), models.rotary(0, tokens)

    def new_cache() -> DynamicCache:
        return DynamicCache(config=models.dense.config)

    def model(which: Call) -> Callable[[], Tensor]:
        return lambda: (
            which(input_ids=ids, past_key_values=new_cache(), use_cache=True, logits_to_keep=1).logits
        )

    calls = {
        DENSE: (model(models.dense), models.in_float32(ids, ())),
        SLIM: (model(models.slim), models.in_float32(ids, models.dropped)),
        SUBLAYERS: (
            lambda: models.sublayers(h, rotary, None, new_cache()),
            sublayers_in_float32(models.sublayers, h, rotary),
        ),
    }
    at: Parameters = {"phase": "prefill", "batch": 1, "tokens": tokens}
    effort = Effort(milliseconds=10_000.0, least=8, most=40)
    yield from _compared(settings, at, calls, {}, effort)


def _decode(settings: Settings, models: DenseAndSlim, batch: int, *, compiled: bool) -> Iterator[Measurement]:
    prompt = settings.pick(PROMPT, 24)
    length = prompt + (_ROOM if compiled else 0)
    ids, token = models.tokens(batch, prompt), models.tokens(batch, 1)
    h, rotary = models.hidden(batch, prompt + 1), models.rotary(prompt, 1)
    newest, mask = h[:, -1:].contiguous(), None
    if compiled:
        mask = (torch.arange(length, device=h.device) <= prompt).view(1, 1, 1, -1).repeat(batch, 1, 1, 1)

    def new_cache() -> Cache:
        config = models.dense.config
        return StaticCache(config, max_cache_len=length) if compiled else DynamicCache(config=config)

    caches = {name: new_cache() for name in (DENSE, SLIM, SUBLAYERS)}
    for name, model in ((DENSE, models.dense), (SLIM, models.slim)):
        model(input_ids=ids, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
    models.sublayers(h[:, :-1], models.rotary(0, prompt), None, caches[SUBLAYERS])
    dense, slim, sublayers = (
        _compiled(settings, call) if compiled else call
        for call in (models.dense.forward, models.slim.forward, models.sublayers.forward)
    )

    def step(which: Call, name: str) -> Callable[[], Tensor]:
        return lambda: which(input_ids=token, past_key_values=caches[name], use_cache=True).logits

    both = torch.cat([ids, token], dim=1)
    expected = sublayers_in_float32(models.sublayers, h, models.rotary(0, prompt + 1))[:, -1:].clone()
    calls = {
        DENSE: (step(dense, DENSE), models.in_float32(both, ())),
        SLIM: (step(slim, SLIM), models.in_float32(both, models.dropped)),
        SUBLAYERS: (lambda: sublayers(newest, rotary, mask, caches[SUBLAYERS]), expected),
    }
    rewind = {name: _rewinder(cache, prompt) for name, cache in caches.items()}
    phase, kind = ("decode, compiled", "static") if compiled else ("decode, eager", "dynamic")
    at: Parameters = {"phase": phase, "batch": batch, "tokens": prompt}
    effort = Effort(3000.0, least=20, most=100) if compiled else Effort(6000.0, least=20, most=40)
    yield from _compared(settings, at, calls, rewind, effort)
    for take_back in rewind.values():
        take_back()
    whole = cache_bytes(caches[DENSE])
    for name in (DENSE, SLIM):
        size = cache_bytes(caches[name])
        yield Measurement(
            {"phase": f"cache, {kind}", "batch": batch, "tokens": length},
            name,
            values={"cache_bytes": float(size), "cache_share": size / whole},
        )


def _compiled(settings: Settings, call: Call) -> Call:
    """A forward as one CUDA graph."""
    # Where only the code is tried out, tracing is what can fail.
    options: dict[str, Any] = {"mode": "reduce-overhead"} if settings.on_gpu else {"backend": "eager"}
    graph = torch.compile(call, fullgraph=True, dynamic=False, **options)

    def step(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return graph(*args, **kwargs)

    return step


def _rewinder(cache: Cache, tokens: int) -> Callable[[], None]:
    """Takes the newest token out of a cache again."""
    if isinstance(cache, DynamicCache):
        return rewinder(cache)

    def rewind() -> None:
        for layer in cache.layers:
            if layer.is_initialized:
                # In place, since the graphs hold its address.
                layer.cumulative_length.fill_(tokens)

    return rewind


def _compared(
    settings: Settings,
    at: Parameters,
    calls: Mapping[str, tuple[Callable[[], Tensor], Tensor]],
    rewind: Mapping[str, Callable[[], None]],
    effort: Effort,
) -> Iterator[Measurement]:
    """Each call judged by what it would be in float32.

    Thirty-two layers of random weights make of bfloat16's roundings some hundredths, in the unpatched model as in the
    slim one, and in another order of the same roundings other ones. So neither is judged by the other: the slim model
    may be as far from its float32 as the dense one is from its own, with a quarter more (an attention too few: 0.7).
    """

    # The unpatched model is measured, not judged; NaN passes nowhere.
    tolerances = {DENSE: math.inf, SLIM: settings.tolerance, SUBLAYERS: _SUBLAYERS_TOLERANCE[settings.dtype]}
    cases = {
        name: against(
            expected,
            call,
            tolerances[name],
            prepare=rewind.get(name),
            yardstick=DENSE if name == SLIM else None,
        )
        for name, (call, expected) in calls.items()
    }
    yield from compare(settings, at, cases, regime=_REGIMES, baseline=DENSE, values=_saved, effort=effort)


def _saved(medians: Medians) -> dict[str, dict[str, float]]:
    """What dropping saved, beside the time of what was dropped."""
    if not {DENSE, SLIM, SUBLAYERS} <= medians.keys():
        return {}
    difference = medians[DENSE] - medians[SLIM]
    return {SLIM: {"saved_ms": difference, "saved_share": difference / medians[SUBLAYERS]}}


@table("layer_drop")
@table("layer_drop_compiled")
def times(content: dict[str, Any]) -> str:
    """Time saved over the time of the dropped sublayers: one row per phase, size and regime; the caches last."""

    def taken(measurement: dict[str, Any] | None) -> str:
        size = tables.figure(measurement, "cache_bytes")
        return tables.milliseconds(measurement) if size is None else f"{size / 2**20:.0f} MiB"

    def of_dense(measurement: dict[str, Any] | None) -> str:
        share = tables.figure(measurement, "cache_share")
        return tables.ratio(measurement, "baseline_ratio") if share is None else f"{share:.3f}"

    points = tables.points(content, "phase", "batch", "tokens", "regime")
    points.sort(key=lambda at: at["phase"].startswith("cache"))
    rows = [
        (
            f"{at['phase']}, batch {at['batch']}, {at['tokens']} tokens"
            + (", GPU only" if at["regime"] == "queued" else ""),
            at,
        )
        for at in points
    ]
    dense, slim, sublayers = ({"candidate": name} for name in (DENSE, SLIM, SUBLAYERS))
    columns = [
        ("dense, ms", dense, taken),
        ("slim, ms", slim, taken),
        ("the 16 sublayers, ms", sublayers, taken),
        ("saved / sublayers", slim, tables.value("saved_share")),
        ("slim / dense", slim, of_dense),
    ]
    return tables.grid(content, "8B shape, 16 of 32 attentions dropped", rows, columns)

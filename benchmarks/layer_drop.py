"""Half of the attentions of an 8B model dropped: the time saved beside the time of what was dropped, eager."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from benchmarks import tables
from benchmarks.compare import Case, compare, relative_error
from benchmarks.llamas import (
    DENSE,
    SLIM,
    SUBLAYERS,
    DenseAndSlim,
    held,
    rewinder,
    saved,
    sublayers_in_float32,
)
from benchmarks.registry import Settings, benchmark, table
from benchmarks.results import Measurement, Parameters
from benchmarks.timing import Effort, Regime
from slimformer.evaluation.timing.speed import cache_bytes

PROMPT = 2048
BATCHES = (1, 16)
# Eager launches take longer than what they launch where the CPU is slow: once what a user waits, once the GPU's part.
_REGIMES: tuple[Regime, ...] = ("queued", "wall")
# Of 16 attentions one behind the other, which have no dense model beside them as a yardstick.
_SUBLAYERS_TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}


@benchmark(
    "layer_drop",
    needs="cuda",
    description="prefill and eager decode of an 8B shape, dense and with 16 of 32 attentions dropped",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Prefill at two lengths, then decode steps on filled caches."""
    models = DenseAndSlim(settings)
    for tokens in settings.pick((2048, 16384), (24,)):
        yield from _prefill(settings, models, tokens)
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    for batch in BATCHES:
        yield from _decode(settings, models, batch, settings.pick(PROMPT, 24))


def _prefill(settings: Settings, models: DenseAndSlim, tokens: int) -> Iterator[Measurement]:
    ids, h, rotary = models.tokens(1, tokens), models.hidden(1, tokens), models.rotary(0, tokens)

    def new_cache() -> DynamicCache:
        return DynamicCache(config=models.dense.config)

    def model(which: LlamaForCausalLM) -> Callable[[], Tensor]:
        return lambda: (
            which(input_ids=ids, past_key_values=new_cache(), use_cache=True, logits_to_keep=1).logits
        )

    cases = judged(
        settings,
        {
            DENSE: (model(models.dense), models.in_float32(ids, ())),
            SLIM: (model(models.slim), models.in_float32(ids, models.dropped)),
            SUBLAYERS: (
                lambda: models.sublayers(h, rotary, None, new_cache()),
                sublayers_in_float32(models.sublayers, h, rotary),
            ),
        },
    )
    parameters: Parameters = {"phase": "prefill", "batch": 1, "tokens": tokens}
    effort = Effort(milliseconds=10_000.0, least=8, most=40)
    for regime in _REGIMES:
        yield from compare(
            settings, parameters, cases, regime=regime, baseline=DENSE, values=saved, effort=effort
        )


def _decode(settings: Settings, models: DenseAndSlim, batch: int, prompt: int) -> Iterator[Measurement]:
    ids, token = models.tokens(batch, prompt), models.tokens(batch, 1)
    h, rotary = models.hidden(batch, prompt + 1), models.rotary(prompt, 1)
    caches = {name: DynamicCache(config=models.dense.config) for name in (DENSE, SLIM, SUBLAYERS)}
    for name, model in ((DENSE, models.dense), (SLIM, models.slim)):
        model(input_ids=ids, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
    models.sublayers(h[:, :-1], models.rotary(0, prompt), None, caches[SUBLAYERS])
    rewind = {name: rewinder(cache) for name, cache in caches.items()}

    def step(which: LlamaForCausalLM, cache: DynamicCache) -> Callable[[], Tensor]:
        return lambda: which(input_ids=token, past_key_values=cache, use_cache=True).logits

    both = torch.cat([ids, token], dim=1)
    expected = sublayers_in_float32(models.sublayers, h, models.rotary(0, prompt + 1))[:, -1:].clone()
    cases = judged(
        settings,
        {
            DENSE: (step(models.dense, caches[DENSE]), models.in_float32(both, ())),
            SLIM: (step(models.slim, caches[SLIM]), models.in_float32(both, models.dropped)),
            SUBLAYERS: (lambda: models.sublayers(h[:, -1:], rotary, None, caches[SUBLAYERS]), expected),
        },
        rewind,
    )
    parameters: Parameters = {"phase": "decode, eager", "batch": batch, "tokens": prompt}
    effort = Effort(milliseconds=6000.0, least=20, most=40)
    for regime in _REGIMES:
        yield from compare(
            settings, parameters, cases, regime=regime, baseline=DENSE, values=saved, effort=effort
        )
    for take_back in rewind.values():
        take_back()
    sizes = held({name: cache_bytes(caches[name]) for name in (DENSE, SLIM)})
    for name, values in sizes.items():
        yield Measurement({"phase": "cache, dynamic", "batch": batch, "tokens": prompt}, name, values=values)


def judged(
    settings: Settings,
    calls: Mapping[str, tuple[Callable[[], Tensor], Tensor]],
    rewind: Mapping[str, Callable[[], None]] | None = None,
) -> dict[str, Case]:
    """Each call judged by what it would be in float32.

    Thirty-two layers of random weights make of bfloat16's roundings some hundredths, in the unpatched model as in the
    slim one, and in another order of the same roundings other ones. So neither is judged by the other: the slim model
    may be as far from its float32 as the dense one is from its own, with a quarter more (an attention too few: 0.7).
    """

    def case(name: str, call: Callable[[], Tensor], expected: Tensor) -> Case:
        prepare = None if rewind is None else rewind[name]

        def check() -> float:
            if prepare is not None:
                prepare()
            return relative_error(call(), expected)

        if name == SUBLAYERS:
            return Case(call, check, _SUBLAYERS_TOLERANCE[settings.dtype], prepare)
        # The unpatched model is measured, not judged; NaN passes nowhere.
        tolerance = math.inf if name == DENSE else settings.tolerance
        return Case(call, check, tolerance, prepare, yardstick=None if name == DENSE else DENSE)

    return {name: case(name, call, expected) for name, (call, expected) in calls.items()}


@table("layer_drop", source="layer_drop")
def times(content: dict[str, Any]) -> str:
    """Time saved over the time of the dropped sublayers, and the caches."""
    return layer_drop_table(content)


def layer_drop_table(content: dict[str, Any]) -> str:
    """One row per phase and size; the caches last."""
    rows, caches = [], []
    names = ("phase", "batch", "tokens", "regime")
    for phase, batch, tokens, regime in tables.points(content, *names, where=lambda p: True):
        at = {"phase": phase, "batch": batch, "tokens": tokens}
        if regime is not None:
            at["regime"] = regime
        dense, slim, sublayers = (tables.find(content, name, **at) for name in (DENSE, SLIM, SUBLAYERS))
        if dense is None or slim is None:
            continue
        if phase.startswith("cache"):
            sizes = (f"{one['values']['cache_bytes'] / 2**20:.0f} MiB" for one in (dense, slim))
            share = f"{slim['values']['cache_share']:.3f}"
            caches.append([f"{phase}, batch {batch}, {tokens} tokens", *sizes, "–", "–", share])
            continue
        # Which regime needs saying only where there are two.
        label = f"{phase}, batch {batch}, {tokens} tokens" + (", GPU only" if regime == "queued" else "")
        share = slim["values"].get("saved_share")
        rows.append(
            [
                label,
                tables.milliseconds(dense),
                tables.milliseconds(slim),
                tables.milliseconds(sublayers),
                "–" if share is None else f"{share:.2f}",
                tables.ratio(slim, "baseline_ratio"),
            ]
        )
    head = ["8B shape, 16 of 32 attentions dropped", "dense, ms", "slim, ms", "the 16 sublayers, ms"]
    return tables.markdown([*head, "saved / sublayers", "slim / dense"], [*rows, *caches])

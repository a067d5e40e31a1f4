"""The same decode with a static cache under torch.compile: one CUDA graph per step, dense and slim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks.compare import compare
from benchmarks.layer_drop import BATCHES, PROMPT, judged, layer_drop_table
from benchmarks.llamas import DENSE, SLIM, SUBLAYERS, DenseAndSlim, held, saved, sublayers_in_float32
from benchmarks.registry import Settings, benchmark, table
from benchmarks.results import Measurement, Parameters
from benchmarks.timing import Effort, Regime
from slimformer.evaluation.timing.speed import cache_bytes

# Room in the static cache behind the prompt.
_ROOM = 128


@benchmark(
    "layer_drop_compiled",
    needs="cuda",
    description="decode of an 8B shape with a static cache under torch.compile, dense and with 16 attentions dropped",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Compile the dense model, the slim one and the dropped sublayers for each batch size."""
    models = DenseAndSlim(settings)
    for batch in BATCHES:
        # Frees the graphs of the batch size before.
        torch.compiler.reset()
        yield from _decode(settings, models, batch, settings.pick(PROMPT, 24))


def _decode(settings: Settings, models: DenseAndSlim, batch: int, prompt: int) -> Iterator[Measurement]:
    config, length = models.dense.config, prompt + _ROOM
    ids, token = models.tokens(batch, prompt), models.tokens(batch, 1)
    h, rotary = models.hidden(batch, prompt + 1), models.rotary(prompt, 1)
    newest = h[:, -1:].contiguous()
    mask = (torch.arange(length, device=h.device) <= prompt).view(1, 1, 1, -1).repeat(batch, 1, 1, 1)
    caches = {name: StaticCache(config=config, max_cache_len=length) for name in (DENSE, SLIM, SUBLAYERS)}
    for name, model in ((DENSE, models.dense), (SLIM, models.slim)):
        model(input_ids=ids, past_key_values=caches[name], use_cache=True, logits_to_keep=1)
    models.sublayers(h[:, :-1], models.rotary(0, prompt), None, caches[SUBLAYERS])

    dense, slim, sublayers = (
        _compiled(settings, call)
        for call in (models.dense.forward, models.slim.forward, models.sublayers.forward)
    )

    def dense_step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return dense(input_ids=token, past_key_values=caches[DENSE], use_cache=True).logits

    def slim_step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return slim(input_ids=token, past_key_values=caches[SLIM], use_cache=True).logits

    def sublayers_step() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        out: Tensor = sublayers(newest, rotary, mask, caches[SUBLAYERS])
        return out

    both = torch.cat([ids, token], dim=1)
    expected = sublayers_in_float32(models.sublayers, h, models.rotary(0, prompt + 1))[:, -1:].clone()
    cases = judged(
        settings,
        {
            DENSE: (dense_step, models.in_float32(both, ())),
            SLIM: (slim_step, models.in_float32(both, models.dropped)),
            SUBLAYERS: (sublayers_step, expected),
        },
        {name: _rewinder(cache, prompt) for name, cache in caches.items()},
    )
    parameters: Parameters = {"phase": "decode, compiled", "batch": batch, "tokens": prompt}
    regimes: tuple[Regime, ...] = ("queued", "wall")
    for regime in regimes:
        yield from compare(
            settings,
            parameters,
            cases,
            regime=regime,
            baseline=DENSE,
            values=saved,
            effort=Effort(milliseconds=3000.0, least=20, most=100),
        )
    sizes = held({name: cache_bytes(caches[name]) for name in (DENSE, SLIM)})
    for name, values in sizes.items():
        yield Measurement({"phase": "cache, static", "batch": batch, "tokens": length}, name, values=values)


def _compiled(settings: Settings, call: Callable[..., Any]) -> Callable[..., Any]:
    if settings.device.type == "cuda":
        return torch.compile(call, mode="reduce-overhead", fullgraph=True, dynamic=False)
    # Where only the code is tried out, tracing is what can fail.
    return torch.compile(call, backend="eager", fullgraph=True, dynamic=False)


def _rewinder(cache: StaticCache, tokens: int) -> Callable[[], None]:
    """Sets the cache's length back; in place, since the graphs hold its address."""

    def rewind() -> None:
        for layer in cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(tokens)

    return rewind


@table("layer_drop_compiled", source="layer_drop_compiled")
def times(content: dict[str, Any]) -> str:
    """As for the eager model, once with the time of the GPU only and once of the whole step."""
    return layer_drop_table(content)

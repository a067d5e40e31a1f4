"""Prefill of an 8B shape with half of the tokens routed past half of the layers, beside what the FLOPs promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import slimformer
from benchmarks import tables
from benchmarks.compare import Case, Medians, compare, relative_error
from benchmarks.llamas import fast_float32, llama_8b, logits_in_float32, with_shared_weights
from benchmarks.registry import Settings, benchmark, table
from benchmarks.results import Measurement, Parameters
from benchmarks.timing import Effort, Regime
from slimformer import MixtureOfDepths
from slimformer.decisions.policy import Decision
from slimformer.methods.mixture_of_depths import Router
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream

DENSE, LOSSLESS = "unpatched", "all tokens, patched"
KEEP = 0.5
ROUTED: dict[str, tuple[Kind, ...]] = {
    "attention": ("attention",),
    "MLP": ("mlp",),
    "attention and MLP": KINDS,
}
_REGIMES: tuple[Regime, ...] = ("queued", "wall")


@benchmark(
    "mixture_of_depths_speed",
    needs="cuda",
    description="8k prefill of an 8B shape, half of the tokens routed past half of the attentions, MLPs or both",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Unpatched, patched with all tokens, and every kind of routing, on the same weights."""
    dense = llama_8b(settings)
    layers, tokens = len(dense.model.layers), settings.pick(8192, 64)
    routed = range(layers // 4, layers // 4 + layers // 2)
    ids = torch.randint(dense.config.vocab_size, (1, tokens), device=settings.device)

    def call(model: LlamaForCausalLM) -> Tensor:
        cache = DynamicCache(config=dense.config)
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    expected = in_float32(dense, ids)
    lossless = slimformer.patch(with_shared_weights(dense))
    cases = {
        DENSE: Case(partial(call, dense), lambda: relative_error(call(dense), expected), math.inf),
        LOSSLESS: Case(
            partial(call, lossless),
            lambda: relative_error(call(lossless), expected),
            settings.tolerance,
            yardstick=DENSE,
        ),
    }
    for name, kinds in ROUTED.items():
        method = random_routers(dense.config.hidden_size, kinds, list(routed))
        recording = _Recording(method, setting=True)
        slim = slimformer.patch(with_shared_weights(dense), recording)
        # Once to let every router meet the ratio on these tokens; from then on they decide as any other.
        call(slim)
        recording.setting = False

        def check(model: LlamaForCausalLM = slim, recording: _Recording = recording) -> float:
            actual = call(model)
            masks = dict(recording.masks)
            return relative_error(
                actual, in_float32(dense, ids, lambda layer, kind: masks.get((layer, kind)))
            )

        cases[name] = Case(partial(call, slim), check, settings.tolerance, yardstick=DENSE)

    def values(medians: Medians) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        whole = flops(dense.config, tokens, ())
        for name, kinds in ROUTED.items():
            bound = whole / flops(dense.config, tokens, kinds, len(routed))
            if name in medians and LOSSLESS in medians:
                found[name] = {"bound": bound, "of_patched": medians[LOSSLESS] / medians[name] / bound}
        return found

    parameters: Parameters = {"model": "8B", "tokens": tokens, "layers": len(routed), "keep": KEEP}
    effort = Effort(milliseconds=10_000.0, least=7, most=30)
    for regime in _REGIMES:
        yield from compare(
            settings, parameters, cases, regime=regime, baseline=DENSE, values=values, effort=effort
        )


def in_float32(
    model: LlamaForCausalLM,
    ids: Tensor,
    keeps: Callable[[int, str], Tensor | None] = lambda layer, kind: None,
) -> Tensor:
    """Logits of the last token with the tokens that every sublayer keeps."""
    with fast_float32(ids.device):
        return logits_in_float32(model, ids, keeps)


def random_routers(hidden: int, kinds: tuple[Kind, ...], layers: list[int]) -> MixtureOfDepths:
    """Routers with random weights; what they keep is set on the tokens that they first see."""
    fields: dict[str, Any] = {"keep": KEEP, **dict.fromkeys(kinds, layers)}
    method = MixtureOfDepths.keeping_everything(hidden, **fields)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(t.shape, generator=generator) if name.endswith("weight") else t
        for name, t in method.weights.items()
    }
    return MixtureOfDepths(weights=weights, **fields)


@dataclass
class _Recording:
    """A method that notes which tokens its routers compute, so that the same can be computed without it.

    Attributes:
        method: The method.
        setting: Whether routers set their thresholds so that the wanted part of the tokens that they see is kept.
        masks: The layer and kind, and the tokens computed, bool `[1, tokens, 1]`.
    """

    method: MixtureOfDepths
    setting: bool
    masks: dict[tuple[int, str], Tensor] = field(default_factory=dict)

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """The method's, with a note of every choice."""
        return {
            sublayer: Decision(rows=tuple(partial(self._choose, sublayer, choose) for choose in plan.rows))
            for sublayer, plan in self.method.decisions(anatomy).items()
        }

    def _choose(self, sublayer: tuple[int, str], router: Any, stream: Stream, x: Tensor) -> Rows | None:
        if self.setting and isinstance(router, Router):
            score = router.scores(stream, x)
            router.bias = router.bias.to(score) - score.quantile(1.0 - KEEP)
        rows: Rows | None = router(stream, x)
        if rows is not None:
            self.masks[sublayer] = rows.mask[None, :, None]
        return rows


def flops(config: LlamaConfig, tokens: int, kinds: tuple[Kind, ...], layers: int = 0) -> float:
    """Multiplications of a prefill without the head, where some layers compute a part of the tokens."""
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    query = 2 * config.hidden_size * heads * head_dim
    key = 2 * config.hidden_size * config.num_key_value_heads * head_dim
    scores = 2 * heads * head_dim * tokens / 2
    mlp = 3 * config.hidden_size * config.intermediate_size
    attention, rest = (KEEP if kind in kinds else 1.0 for kind in KINDS)
    routed = attention * (query + scores) + key + rest * mlp
    return tokens * (layers * routed + (config.num_hidden_layers - layers) * (query + scores + key + mlp))


@table("mixture_of_depths_speed", source="mixture_of_depths_speed")
def speedups(content: dict[str, Any]) -> str:
    """The speed-up of every kind of routing over unpatched and over patched, and what the FLOPs promise."""
    regimes = {"queued": "GPU only", "wall": "as a caller waits"}
    rows = []
    for measurement in content["measurements"]:
        if measurement["milliseconds"] is None:
            continue
        at, values = measurement["parameters"], measurement["values"]
        bound, reached = values.get("bound"), values.get("of_patched")
        rows.append(
            [
                f"{at['tokens']} tokens, {regimes[at['regime']]}",
                measurement["candidate"],
                tables.milliseconds(measurement),
                f"{1 / measurement['baseline_ratio']:.2f}×",
                "–" if bound is None else f"{bound:.2f}×",
                "–" if bound is None or reached is None else f"{bound * reached:.2f}×",
                "–" if reached is None else f"{reached:.2f}",
            ]
        )
    head = ["Prefill, 8B", "50% of the tokens, 16 of 32 layers", "ms", "over unpatched"]
    return tables.markdown([*head, "FLOPs promise", "over patched", "reached"], rows)

"""Whole models that compute half of the tokens in most sublayers, beside dense and beside what the FLOPs promise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import slimformer
from benchmarks import tables
from benchmarks.compare import Case, Medians, compare, relative_error
from benchmarks.llamas import llama_8b, logits_in_float32, smollm2_135m, with_shared_weights
from benchmarks.registry import Settings, benchmark, table
from benchmarks.results import Measurement, Parameters
from benchmarks.timing import Effort, Regime
from slimformer.methods.elimination.random_keep import RandomKeep, chances

DENSE, LOSSLESS = "unpatched", "all tokens, patched"
KEEPS = (0.75, 0.5, 0.25, 0.1)


@benchmark(
    "executor_rows",
    needs="cuda",
    description="prefill of an 8B shape with half of the tokens from layer 8 on, and of SmolLM2's shape at many ratios",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """The large model at one ratio, the small one at several, eager and from CUDA graphs."""
    yield from _large(settings)
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    dense = smollm2_135m(settings)
    for tokens in settings.pick((1024, 4096), (24,)):
        yield from _small(settings, dense, tokens, ("wall", "graph"), ("attention", "mlp"))


@benchmark(
    "executor_rows_cpu",
    needs="any",
    description="prefill of SmolLM2's shape on the CPU: patched with all tokens, and with some in the MLPs",
)
def run_on_cpu(settings: Settings) -> Iterator[Measurement]:
    """The references instead of kernels."""
    on_cpu = Settings(torch.device("cpu"), settings.smoke)
    dense = smollm2_135m(on_cpu)
    for tokens in on_cpu.pick((256, 1024), (24,)):
        yield from _small(on_cpu, dense, tokens, ("wall",), ("mlp",))


def _large(settings: Settings) -> Iterator[Measurement]:
    dense = llama_8b(settings)
    layers, tokens = len(dense.model.layers), settings.pick(16384, 24)
    policy = RandomKeep(0.5, layers=range(layers // 4, layers), counts="equal")
    yield from _compared(
        settings,
        {"model": "8B", "tokens": tokens, "kinds": "attention, mlp"},
        dense,
        tokens,
        {f"half of the tokens from layer {layers // 4} on": policy},
        ("queued", "wall"),
    )


def _small(
    settings: Settings,
    dense: LlamaForCausalLM,
    tokens: int,
    regimes: tuple[Regime, ...],
    kinds: tuple[Any, ...],
) -> Iterator[Measurement]:
    policies = {f"{keep:.0%} of the tokens": RandomKeep(keep, kinds=kinds, counts="equal") for keep in KEEPS}
    parameters: Parameters = {"model": "SmolLM2-135M", "tokens": tokens, "kinds": ", ".join(kinds)}
    yield from _compared(settings, parameters, dense, tokens, policies, regimes)


def _compared(
    settings: Settings,
    parameters: Parameters,
    dense: LlamaForCausalLM,
    tokens: int,
    policies: dict[str, RandomKeep],
    regimes: tuple[Regime, ...],
) -> Iterator[Measurement]:
    ids = torch.randint(dense.config.vocab_size, (1, tokens), device=settings.device)

    def call(model: LlamaForCausalLM) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits

    def case(model: LlamaForCausalLM, expected: Tensor) -> Case:
        return Case(
            partial(call, model),
            lambda: relative_error(call(model), expected),
            math.inf if model is dense else settings.tolerance,
            yardstick=None if model is dense else DENSE,
        )

    expected = logits_in_float32(dense, ids)
    cases = {
        DENSE: case(dense, expected),
        LOSSLESS: case(slimformer.patch(with_shared_weights(dense)), expected),
    }
    for name, policy in policies.items():
        slim = slimformer.patch(with_shared_weights(dense), policy)
        cases[name] = case(slim, logits_in_float32(dense, ids, kept(policy, tokens, settings.device)))

    def values(medians: Medians) -> dict[str, dict[str, float]]:
        promised = {name: flops(dense.config, tokens, p) for name, p in policies.items()}
        whole = flops(dense.config, tokens, None)
        return {name: {"promised_speedup": whole / work} for name, work in promised.items()}

    effort = Effort(milliseconds=10_000.0, least=7, most=30)
    for regime in regimes:
        yield from compare(
            settings, parameters, cases, regime=regime, baseline=DENSE, values=values, effort=effort
        )


def kept(policy: RandomKeep, tokens: int, device: torch.device) -> Callable[[int, str], Tensor | None]:
    """Which tokens a policy computes in a sublayer, found without the executor, as `logits_in_float32` asks."""

    def keeps(layer: int, kind: str) -> Tensor | None:
        if kind not in policy.kinds or (policy.layers is not None and layer not in policy.layers):
            return None
        chance = chances(torch.arange(tokens, device=device), 2 * layer + (kind == "mlp"))
        best = chance.topk(max(round(policy.keep * tokens), 1), largest=False).indices
        mask = torch.zeros(tokens, dtype=torch.bool, device=device).index_fill(0, best, True)
        return mask[None, :, None]

    return keeps


def flops(config: LlamaConfig, tokens: int, policy: RandomKeep | None) -> float:
    """Multiplications of a prefill, without the head: linear layers, and causal scores and their use."""
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    query = 2 * config.hidden_size * heads * head_dim
    key = 2 * config.hidden_size * config.num_key_value_heads * head_dim
    scores = 2 * heads * head_dim * tokens / 2
    mlp = 3 * config.hidden_size * config.intermediate_size
    total = 0.0
    for index in range(config.num_hidden_layers):
        touched = policy is not None and (policy.layers is None or index in policy.layers)
        kept = {
            kind: policy.keep if policy is not None and touched and kind in policy.kinds else 1.0
            for kind in ("attention", "mlp")
        }
        total += kept["attention"] * (query + scores) + key + kept["mlp"] * mlp
    return total * tokens


@table("executor_rows", source="executor_rows")
def speedups(content: dict[str, Any]) -> str:
    """The speed-up of every choice over the unpatched model, and what the FLOPs promise."""
    return _speedups(content)


@table("executor_rows_cpu", source="executor_rows_cpu")
def speedups_on_cpu(content: dict[str, Any]) -> str:
    """The same on the CPU."""
    return _speedups(content)


def _speedups(content: dict[str, Any]) -> str:
    names = ("model", "tokens", "kinds", "regime")
    regimes = {"queued": "GPU only", "wall": "eager", "graph": "CUDA graph"}
    rows = []
    for point in tables.points(content, *names, where=lambda _: True):
        at = dict(zip(names, point, strict=True))
        dense = tables.find(content, DENSE, **at)
        for measurement in content["measurements"]:
            same = all(measurement["parameters"].get(name) == value for name, value in at.items())
            if not same or measurement["candidate"] == DENSE or measurement["milliseconds"] is None:
                continue
            promised = measurement["values"].get("promised_speedup")
            speedup = 1 / measurement["baseline_ratio"]
            rows.append(
                [
                    f"{at['model']}, {at['tokens']} tokens, {at['kinds']}, {regimes[at['regime']]}",
                    measurement["candidate"],
                    tables.milliseconds(dense),
                    tables.milliseconds(measurement),
                    f"{speedup:.2f}×",
                    "–" if promised is None else f"{promised:.2f}×",
                    "–" if promised is None else f"{speedup / promised:.2f}",
                ]
            )
    head = ["Prefill", "computed", "unpatched, ms", "patched, ms", "speed-up", "FLOPs promise", "reached"]
    return tables.markdown(head, rows)

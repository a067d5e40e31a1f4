"""Prefill of whole models that compute a part of the tokens: chosen by chance, by a router, or eliminated."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from benchmarks.frame import tables
from benchmarks.frame.compare import release
from benchmarks.frame.flops import flops
from benchmarks.frame.inputs import UNPATCHED
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement
from benchmarks.frame.timing import Effort, Regime
from benchmarks.speed.llamas import llama_8b, smollm2_135m
from benchmarks.speed.prefills import LOSSLESS, Sublayer, Way, compared
from slimformer import MixtureOfDepths, TokenElimination
from slimformer.decisions.policy import Decision
from slimformer.methods.elimination.block_predictor import BlockPredictor
from slimformer.methods.elimination.random_keep import RandomKeep
from slimformer.methods.mixture_of_depths import Router
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream

KEEPS = (0.75, 0.5, 0.25, 0.1)
ROUTED: dict[str, tuple[Kind, ...]] = {
    "attention": ("attention",),
    "MLP": ("mlp",),
    "attention and MLP": KINDS,
}
_ROUTED_KEEP = 0.5
_EFFORT = Effort(milliseconds=10_000.0, least=7, most=30)
_LONG_EFFORT = Effort(milliseconds=15_000.0, least=5, most=15)


@benchmark(
    "executor_rows",
    "prefill of an 8B shape with half of the tokens from layer 8 on, and of SmolLM2's shape at many ratios",
    on="GPU",
)
def executor_rows(settings: Settings) -> Iterator[Measurement]:
    """The large model at one ratio, the small one at several, eager and from CUDA graphs."""
    dense = llama_8b(settings)
    layers = len(dense.model.layers)
    policy = RandomKeep(0.5, layers=range(layers // 4, layers), counts="equal")
    policies = {f"half of the tokens from layer {layers // 4} on": policy}
    yield from _by_chance(settings, "8B", dense, settings.pick(16384, 24), policies, ("queued", "wall"))
    del dense
    release()
    yield from _many_ratios(settings, settings.pick((1024, 4096), (24,)), ("wall", "graph"), KINDS)


@benchmark(
    "executor_rows_cpu",
    "prefill of SmolLM2's shape on the CPU: patched with all tokens, and with some in the MLPs",
    on="CPU",
)
def executor_rows_cpu(settings: Settings) -> Iterator[Measurement]:
    """The references instead of kernels."""
    yield from _many_ratios(settings, settings.pick((256, 1024), (24,)), ("wall",), ("mlp",))


def _many_ratios(
    settings: Settings, lengths: Sequence[int], regimes: Sequence[Regime], kinds: Sequence[Kind]
) -> Iterator[Measurement]:
    dense = smollm2_135m(settings)
    policies = {f"{keep:.0%} of the tokens": RandomKeep(keep, kinds=kinds, counts="equal") for keep in KEEPS}
    for tokens in lengths:
        yield from _by_chance(settings, "SmolLM2-135M", dense, tokens, policies, regimes)


def _by_chance(
    settings: Settings,
    name: str,
    dense: LlamaForCausalLM,
    tokens: int,
    policies: dict[str, RandomKeep],
    regimes: Sequence[Regime],
) -> Iterator[Measurement]:
    whole, ways = flops(dense.config, tokens), {}
    for label, policy in policies.items():

        def kept(layer: int, kind: Kind, policy: RandomKeep = policy) -> float:
            touched = kind in policy.kinds and (policy.layers is None or layer in policy.layers)
            return policy.keep if touched else 1.0

        ways[label] = Way(policy, whole / flops(dense.config, tokens, kept))
    (kinds,) = {", ".join(policy.kinds) for policy in policies.values()}
    yield from compared(
        settings,
        name,
        dense,
        tokens,
        ways,
        regimes=regimes,
        effort=_EFFORT,
        further={"kinds": kinds},
        cached=False,
        values=lambda medians: {label: {"promised_speedup": way.promise} for label, way in ways.items()},
    )


@benchmark(
    "elimination_speed",
    "first token of 16k and 32k prompts of an 8B shape, with tokens leaving at layer 8 or 13",
    on="GPU",
)
def elimination_speed(settings: Settings) -> Iterator[Measurement]:
    """Attention scores at every setting, a predictor and chance at one per layer."""
    dense = llama_8b(settings)
    layers = settings.pick((8, 13), (1, 2))
    methods = {
        f"{keep:.0%} from layer {layer} on": TokenElimination({layer: keep})
        for layer in layers
        for keep in (0.5, 0.2, 0.1)
    }
    for layer in layers:
        weights = BlockPredictor(dense.config.hidden_size).tensors(layer)
        predicted = TokenElimination({layer: 0.2}, scorer="predictor", weights=weights)
        methods[f"20% from layer {layer} on, predicted"] = predicted
        # As many tokens without looking at any: what is above this is the cost of choosing.
        methods[f"20% from layer {layer} on, at random"] = TokenElimination({layer: 0.2}, scorer="random")
    for tokens in settings.pick((16384, 32768), (300,)):
        yield from _eliminated(settings, "8B", dense, tokens, methods)


@benchmark(
    "elimination_speed_cpu",
    "first token of a 4k prompt of SmolLM2's shape on the CPU at half of the prefill's FLOPs",
    on="CPU",
)
def elimination_speed_cpu(settings: Settings) -> Iterator[Measurement]:
    """The references instead of kernels."""
    methods = {
        f"{keep:.0%} from layer {layer} on": TokenElimination({layer: keep})
        for layer, keep in settings.pick({10: 0.25, 5: 0.4}, {1: 0.5}).items()
    }
    tokens = settings.pick(4096, 300)
    yield from _eliminated(settings, "SmolLM2-135M", smollm2_135m(settings), tokens, methods)


def _eliminated(
    settings: Settings, name: str, dense: LlamaForCausalLM, tokens: int, methods: dict[str, TokenElimination]
) -> Iterator[Measurement]:
    layers, ways = len(dense.model.layers), {}
    for label, method in methods.items():
        ((start, keep),) = method.schedule.items()
        ways[label] = Way(method, layers / (start + keep * (layers - start)))
    # As many tokens at random, for those whose choice has a price.
    chance = {
        label: other
        for label, method in methods.items()
        for other, by in methods.items()
        if other != label and by.scorer == "random" and by.schedule == method.schedule
    }
    found = compared(settings, name, dense, tokens, ways, regimes=("wall",), effort=_LONG_EFFORT)
    by_name = {measurement.candidate: measurement for measurement in found}
    for label, measurement in by_name.items():
        involved = (measurement, by_name.get(chance.get(label, "")), by_name[LOSSLESS])
        own, unseen, patched = (one and one.milliseconds and one.milliseconds.p50 for one in involved)
        if own and unseen and patched:
            values = {**measurement.values, "choosing": (own - unseen) / patched}
            yield dataclasses.replace(measurement, values=values)
        else:
            yield measurement


@benchmark(
    "mixture_of_depths_speed",
    "8k prefill of an 8B shape, half of the tokens routed past half of the attentions, MLPs or both",
    on="GPU",
)
def mixture_of_depths_speed(settings: Settings) -> Iterator[Measurement]:
    """Unpatched, patched with all tokens, and every kind of routing, on the same weights."""
    dense, tokens = llama_8b(settings), settings.pick(8192, 64)
    layers = len(dense.model.layers)
    routed, ways = range(layers // 4, layers // 4 + layers // 2), {}
    for name, kinds in ROUTED.items():

        def kept(layer: int, kind: Kind, kinds: tuple[Kind, ...] = kinds) -> float:
            return _ROUTED_KEEP if kind in kinds and layer in routed else 1.0

        method = _AtRatio(_random_routers(dense.config.hidden_size, kinds, list(routed)), tokens)
        ways[name] = Way(method, flops(dense.config, tokens) / flops(dense.config, tokens, kept))
    yield from compared(
        settings,
        "8B",
        dense,
        tokens,
        ways,
        regimes=("queued", "wall"),
        effort=_EFFORT,
        further={"layers": len(routed), "keep": _ROUTED_KEEP},
    )


def _random_routers(hidden: int, kinds: tuple[Kind, ...], layers: list[int]) -> MixtureOfDepths:
    fields: dict[str, Any] = {"keep": _ROUTED_KEEP, **dict.fromkeys(kinds, layers)}
    method = MixtureOfDepths.keeping_everything(hidden, **fields)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(t.shape, generator=generator) if name.endswith("weight") else t
        for name, t in method.weights.items()
    }
    return MixtureOfDepths(weights=weights, **fields)


@dataclass
class _AtRatio:
    """Routers that keep half of the first prompt of a length; from then on they decide as any other."""

    method: MixtureOfDepths
    tokens: int

    def decisions(self, anatomy: Anatomy) -> dict[Sublayer, Decision]:
        """The method's, whose routers set their thresholds once."""
        return {
            sublayer: dataclasses.replace(plan, rows=tuple(self._setting(router) for router in plan.rows))
            for sublayer, plan in self.method.decisions(anatomy).items()
        }

    def _setting(self, router: Any) -> Any:
        waits = isinstance(router, Router)

        def choose(stream: Stream, x: Tensor) -> Rows | None:
            nonlocal waits
            if waits and len(x) == self.tokens:
                waits = False
                score = router.scores(stream, x)
                router.bias = router.bias.to(score) - score.quantile(1.0 - _ROUTED_KEEP)
            rows: Rows | None = router(stream, x)
            return rows

        return choose


def _part(whole: str, reached: bool = False) -> tables.Cell:
    """The speed-up as a part of a promised one; or `of_patched`, that part beside the patched model, times it."""

    def cell(measurement: dict[str, Any]) -> str:
        promise, part = (tables.figure(measurement, name) for name in (whole, "of_patched"))
        if promise is None or (reached and part is None):
            return "–"
        return (
            f"{promise * part:.2f}×"
            if reached and part
            else f"{1 / measurement['baseline_ratio'] / promise:.2f}"
        )

    return cell


def random_speedups(content: dict[str, Any]) -> str:
    """The speed-up of every choice over the unpatched model, and what the FLOPs promise."""
    regimes = {"queued": "GPU only", "wall": "eager", "graph": "CUDA graph"}

    def label(measurement: dict[str, Any]) -> str:
        at = measurement["parameters"]
        return f"{at['model']}, {at['tokens']} tokens, {at['kinds']}, {regimes[at['regime']]}"

    def unpatched(measurement: dict[str, Any]) -> str:
        return tables.milliseconds(tables.find(content, UNPATCHED, **measurement["parameters"]))

    patched = [m for m in content["measurements"] if m["candidate"] != UNPATCHED]
    return tables.by_measurement(
        {"measurements": patched},
        {
            "Prefill": label,
            "computed": tables.candidate,
            "unpatched, ms": unpatched,
            "patched, ms": tables.milliseconds,
            "speed-up": tables.gain,
            "FLOPs promise": tables.value("promised_speedup", unit="×"),
            "reached": _part("promised_speedup"),
        },
    )


def elimination_speedups(content: dict[str, Any]) -> str:
    """Time to first token and how much of the bound is reached."""
    return tables.by_measurement(
        content,
        {
            "Prompt": lambda m: f"{m['parameters']['model']}, {m['parameters']['tokens']} tokens",
            "computed": tables.candidate,
            "first token, ms": tables.milliseconds,
            "speed-up": tables.gain,
            "bound": tables.value("bound", unit="×"),
            "of the bound": _part("bound"),
            "beside patched": tables.value("of_patched"),
            "choosing": tables.value("choosing", ".1%"),
        },
    )


for _device in ("", "_cpu"):
    table(f"executor_rows{_device}")(random_speedups)
    table(f"elimination_speed{_device}")(elimination_speedups)


@table("mixture_of_depths_speed")
def routing_speedups(content: dict[str, Any]) -> str:
    """The speed-up of every kind of routing over unpatched and over patched, and what the FLOPs promise."""
    regimes = {"queued": "GPU only", "wall": "as a caller waits"}
    return tables.by_measurement(
        content,
        {
            "Prefill, 8B": lambda m: (
                f"{m['parameters']['tokens']} tokens, {regimes[m['parameters']['regime']]}"
            ),
            "50% of the tokens, 16 of 32 layers": tables.candidate,
            "ms": tables.milliseconds,
            "over unpatched": tables.gain,
            "FLOPs promise": tables.value("bound", unit="×"),
            "over patched": _part("bound", reached=True),
            "reached": tables.value("of_patched"),
        },
    )

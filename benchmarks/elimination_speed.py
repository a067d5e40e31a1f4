"""Time to first token of long prompts whose tokens leave at one layer, beside the bound that the schedule sets."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import slimformer
from benchmarks import tables
from benchmarks.compare import Case, Medians, compare, relative_error
from benchmarks.llamas import llama_8b, logits_in_float32, smollm2_135m, with_shared_weights
from benchmarks.registry import Settings, benchmark, table
from benchmarks.results import Measurement, Parameters
from benchmarks.timing import Effort
from slimformer import TokenElimination
from slimformer.decisions.policy import Decision
from slimformer.methods.elimination.block_predictor import BlockPredictor
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import Kind
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream

DENSE, LOSSLESS = "unpatched", "all tokens, patched"


@benchmark(
    "elimination_speed",
    needs="cuda",
    description="first token of 16k and 32k prompts of an 8B shape, with tokens leaving at layer 8 or 13",
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Attention scores at every setting, a predictor and chance at one per layer."""
    dense = llama_8b(settings)
    layers = settings.pick((8, 13), (1, 2))
    for tokens in settings.pick((16384, 32768), (300,)):
        methods = {
            f"{keep:.0%} from layer {layer} on": TokenElimination({layer: keep})
            for layer in layers
            for keep in (0.5, 0.2, 0.1)
        }
        for layer in layers:
            weights = BlockPredictor(dense.config.hidden_size).tensors(layer)
            methods[f"20% from layer {layer} on, predicted"] = TokenElimination(
                {layer: 0.2}, scorer="predictor", weights=weights
            )
            # As many tokens without looking at any: what is above this is the cost of choosing.
            methods[f"20% from layer {layer} on, at random"] = TokenElimination({layer: 0.2}, scorer="random")
        yield from _compared(settings, "8B", dense, tokens, methods)


@benchmark(
    "elimination_speed_cpu",
    needs="any",
    description="first token of a 4k prompt of SmolLM2's shape on the CPU at half of the prefill's FLOPs",
)
def run_on_cpu(settings: Settings) -> Iterator[Measurement]:
    """The references instead of kernels."""
    on_cpu = Settings(torch.device("cpu"), settings.smoke)
    schedules = {10: 0.25, 5: 0.4} if not settings.smoke else {1: 0.5}
    methods = {
        f"{keep:.0%} from layer {layer} on": TokenElimination({layer: keep})
        for layer, keep in schedules.items()
    }
    yield from _compared(on_cpu, "SmolLM2-135M", smollm2_135m(on_cpu), on_cpu.pick(4096, 300), methods)


@dataclass
class _Recording:
    """A method that notes which rows it let stay, so that the same can be computed without it.

    Attributes:
        method: The method.
        stayed: The layer and the sorted rows.
    """

    method: TokenElimination
    stayed: dict[int, Tensor] = field(default_factory=dict)

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """The method's, with a note of every choice."""
        return {
            (layer, kind): Decision(
                not_evicted=tuple(partial(self._choose, layer, choose) for choose in plan.not_evicted),
                evict_caches=True,
            )
            for (layer, kind), plan in self.method.decisions(anatomy).items()
        }

    def _choose(self, layer: int, choose: Any, stream: Stream, x: Tensor) -> Rows | None:
        rows: Rows | None = choose(stream, x)
        if rows is not None:
            self.stayed[layer] = rows.index
        return rows


def _compared(
    settings: Settings, name: str, dense: LlamaForCausalLM, tokens: int, methods: dict[str, TokenElimination]
) -> Iterator[Measurement]:
    ids = torch.randint(dense.config.vocab_size, (1, tokens), device=settings.device)

    def call(model: LlamaForCausalLM) -> Tensor:
        cache = DynamicCache(config=dense.config)
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits

    # Three more bits than bfloat16 has are enough to judge it by, at an eighth of float32's time.
    torch.set_float32_matmul_precision("high" if settings.device.type == "cuda" else "highest")
    expected = logits_in_float32(dense, ids)
    lossless = slimformer.patch(with_shared_weights(dense))
    cases = {
        DENSE: Case(partial(call, dense), lambda: relative_error(call(dense), expected), math.inf),
        LOSSLESS: Case(
            partial(call, lossless),
            lambda: relative_error(call(lossless), expected),
            settings.tolerance,
            None,
            DENSE,
        ),
    }
    for label, method in methods.items():
        recording = _Recording(method)
        slim = slimformer.patch(with_shared_weights(dense), recording)

        def check(model: LlamaForCausalLM = slim, recording: _Recording = recording) -> float:
            actual = call(model)
            return relative_error(actual, logits_in_float32(dense, ids, stays=recording.stayed.get))

        cases[label] = Case(partial(call, slim), check, settings.tolerance, None, DENSE)
    layers = len(dense.model.layers)

    def values(medians: Medians) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        chance = {
            tuple(method.schedule.items()): medians[label]
            for label, method in methods.items()
            if method.scorer == "random" and label in medians
        }
        for label, method in methods.items():
            if label not in medians:
                continue
            ((start, keep),) = method.schedule.items()
            found[label] = {"bound": layers / (start + keep * (layers - start))}
            if LOSSLESS not in medians:
                continue
            found[label]["of_patched"] = medians[LOSSLESS] / medians[label] / found[label]["bound"]
            unseen = chance.get(((start, keep),))
            if unseen is not None and method.scorer != "random":
                found[label]["choosing"] = (medians[label] - unseen) / medians[LOSSLESS]
        return found

    parameters: Parameters = {"model": name, "tokens": tokens}
    effort = Effort(milliseconds=15_000.0, least=5, most=15)
    yield from compare(
        settings, parameters, cases, regime="wall", baseline=DENSE, values=values, effort=effort
    )
    torch.set_float32_matmul_precision("highest")


@table("elimination_speed", source="elimination_speed")
def speedups(content: dict[str, Any]) -> str:
    """Time to first token and how much of the bound is reached."""
    return _speedups(content)


@table("elimination_speed_cpu", source="elimination_speed_cpu")
def speedups_on_cpu(content: dict[str, Any]) -> str:
    """The same on the CPU."""
    return _speedups(content)


def _speedups(content: dict[str, Any]) -> str:
    rows = []
    for measurement in content["measurements"]:
        at, values = measurement["parameters"], measurement["values"]
        if measurement["milliseconds"] is None:
            continue
        speedup, bound = 1 / measurement["baseline_ratio"], values.get("bound")
        rows.append(
            [
                f"{at['model']}, {at['tokens']} tokens",
                measurement["candidate"],
                tables.milliseconds(measurement),
                f"{speedup:.2f}×",
                "–" if bound is None else f"{bound:.2f}×",
                "–" if bound is None else f"{speedup / bound:.2f}",
                "–" if "of_patched" not in values else f"{values['of_patched']:.2f}",
                "–" if "choosing" not in values else f"{100 * values['choosing']:.1f}%",
            ]
        )
    head = ["Prompt", "computed", "first token, ms", "speed-up", "bound", "of the bound", "beside patched"]
    return tables.markdown([*head, "choosing"], rows)

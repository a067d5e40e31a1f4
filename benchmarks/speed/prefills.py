"""Prefill of a random model: unpatched, patched, and with methods that pass tokens by, all on the same weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

import slimformer
from benchmarks.frame.compare import Case, Medians, compare, relative_error
from benchmarks.frame.inputs import UNPATCHED
from benchmarks.frame.registry import Settings
from benchmarks.frame.results import Measurement, Parameters
from benchmarks.frame.timing import Effort, Regime
from benchmarks.speed.llamas import logits_in_float32, with_shared_weights
from slimformer.decisions.policy import Decision
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import Kind
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream

LOSSLESS = "all tokens, patched"
Sublayer = tuple[int, Kind]


@dataclass(frozen=True)
class Way:
    """A method, and how many times faster than with all tokens the prefill should be with it."""

    method: Any
    promise: float


def prefill(model: LlamaForCausalLM, ids: Tensor, *, cached: bool = True) -> Tensor:
    """Logits of the last token, with keys and values kept or not."""
    cache = DynamicCache(config=model.config) if cached else None
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=cached, logits_to_keep=1).logits
    return logits


def compared(
    settings: Settings,
    name: str,
    dense: LlamaForCausalLM,
    tokens: int,
    ways: Mapping[str, Way],
    *,
    regimes: Sequence[Regime],
    effort: Effort,
    further: Parameters | None = None,
    cached: bool = True,
    values: Callable[[Medians], Mapping[str, Mapping[str, float]]] | None = None,
) -> Iterator[Measurement]:
    """Every way at one length; each is checked against float32 with the tokens that it was seen to compute.

    Args:
        settings: Of the run.
        name: Of the model.
        dense: The unpatched model.
        tokens: Of the prompt.
        ways: By name.
        regimes: How calls are launched and timed.
        effort: How long to measure.
        further: More of the point than model and tokens.
        cached: Whether keys and values are kept.
        values: Figures in place of `bound`, the promise, and `of_patched`, the part of it that is reached beside the
            patched model.
    """
    ids = torch.randint(dense.config.vocab_size, (1, tokens), device=settings.device)
    recordings = {LOSSLESS: Recording(None)} | {label: Recording(way.method) for label, way in ways.items()}
    cases = {UNPATCHED: _case(settings, dense, dense, ids, Recording(None), cached)}
    for label, recording in recordings.items():
        methods = [] if recording.method is None else [recording]
        slim = slimformer.patch(with_shared_weights(dense), *methods)
        cases[label] = _case(settings, slim, dense, ids, recording, cached)

    def reached(medians: Medians) -> dict[str, dict[str, float]]:
        found = {label: {"bound": way.promise} for label, way in ways.items()}
        for label in found.keys() & medians.keys() if LOSSLESS in medians else ():
            found[label]["of_patched"] = medians[LOSSLESS] / medians[label] / ways[label].promise
        return found

    yield from compare(
        settings,
        {"model": name, "tokens": tokens, **(further or {})},
        cases,
        regime=regimes,
        baseline=UNPATCHED,
        values=values or reached,
        effort=effort,
    )


def _case(
    settings: Settings,
    model: LlamaForCausalLM,
    dense: LlamaForCausalLM,
    ids: Tensor,
    recording: Recording,
    cached: bool,
) -> Case:
    def check() -> float:
        actual = prefill(model, ids, cached=cached)
        return relative_error(actual, logits_in_float32(dense, ids, recording.computed, recording.stayed))

    run = partial(prefill, model, ids, cached=cached)
    if model is dense:
        return Case(run, check, math.inf)
    return Case(run, check, settings.tolerance, yardstick=UNPATCHED)


@dataclass
class Recording:
    """A method that notes which rows it chose, so that the same can be computed without it.

    Attributes:
        method: The method; None for all rows.
        rows: Those that a sublayer computed.
        left: Those that were left in the stream from a layer on.
    """

    method: Any
    rows: dict[Sublayer, Rows] = field(default_factory=dict)
    left: dict[Sublayer, Rows] = field(default_factory=dict)

    def decisions(self, anatomy: Anatomy) -> dict[Sublayer, Decision]:
        """The method's, with a note of every choice."""

        def noting(where: dict[Sublayer, Rows], sublayer: Sublayer, choose: Any) -> Any:
            def choice(stream: Stream, x: Tensor) -> Rows | None:
                chosen: Rows | None = choose(stream, x)
                if chosen is not None:
                    where[sublayer] = chosen
                return chosen

            return choice

        return {
            sublayer: dataclasses.replace(
                plan,
                rows=tuple(noting(self.rows, sublayer, choose) for choose in plan.rows),
                not_evicted=tuple(noting(self.left, sublayer, choose) for choose in plan.not_evicted),
            )
            for sublayer, plan in self.method.decisions(anatomy).items()
        }

    def computed(self, layer: int, kind: Kind) -> Tensor | None:
        """Whether a sublayer computed each token, bool `[1, tokens, 1]`; None for all."""
        rows = self.rows.get((layer, kind))
        return None if rows is None else rows.mask[None, :, None]

    def stayed(self, layer: int) -> Tensor | None:
        """Which tokens stayed from a layer on, sorted indices; None for all."""
        rows = self.left.get((layer, "attention"))
        return None if rows is None else rows.index

"""Greedy search: drop, one after the other, what moves the model least from the dense one.

SLEB (arXiv 2402.09025), BlockPruner (2406.10594) and FinerCut (2405.18218) select by output in this way; here the
replacements are fitted before a candidate is judged, and a candidate at layer i costs only the layers from i on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from slimformer.cache.slots import compact_slots
from slimformer.calibration.drops.divergence_to_dense import Divergence
from slimformer.calibration.drops.fitting import fit_each, fit_together
from slimformer.calibration.drops.replay import Call, Dropped, Sublayer, executors, run_layers
from slimformer.calibration.drops.similarity import Unit
from slimformer.decisions.replacements import Replace
from slimformer.errors import CalibrationError, PlanError
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS


@dataclass(frozen=True)
class Step:
    """One removal.

    Attributes:
        kind: What was removed.
        layer: Of which layer.
        divergence: From the dense model, with this and all earlier removals, replacements fitted: that of the source
            that moves most; None where it was not measured.
        sources: The same of every source, where there are several.
    """

    kind: Unit
    layer: int
    divergence: float | None
    sources: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: Unit, layer: int, divergences: Mapping[str, float]) -> Step:
        """From the divergence of every source."""
        several = dict(divergences) if len(divergences) > 1 else {}
        return cls(kind, layer, max(divergences.values()), several)

    def to_dict(self) -> dict[str, Any]:
        """As a plan's provenance holds it."""
        known: dict[str, Any] = {} if self.divergence is None else {"divergence": self.divergence}
        return {
            "kind": self.kind,
            "layer": self.layer,
            **known,
            **({"sources": dict(self.sources)} if self.sources else {}),
        }


class Judge(Protocol):
    """Says how far the model is from the dense one without some of its sublayers."""

    @property
    def name(self) -> str:
        """What is measured; 0 is equal to dense."""
        ...

    def begin(self, dropped: Dropped) -> None:
        """Called before candidates are judged on top of those that are `dropped` already."""
        ...

    def divergence(self, dropped: Dropped, start: int) -> Mapping[str, float]:
        """That of every source with all of `dropped`; below layer `start` they are those of the last `begin`."""
        ...


@dataclass
class Replay:
    """Judges by running the layers over recorded batches, from the first that changes on.

    Attributes:
        anatomy: The model's layers.
        calls: The batches.
        measure: The divergence, recorded on them.
    """

    anatomy: Anatomy
    calls: Sequence[Call]
    measure: Divergence
    inputs: list[list[Tensor]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the divergence is."""
        return self.measure.name

    @torch.no_grad()
    def begin(self, dropped: Dropped) -> None:
        """Record what every layer reads."""
        layers = executors(self.anatomy, dropped)
        self.inputs = []
        for call in self.calls:
            inputs: list[Tensor] = []
            run_layers(layers, call, call.hidden, 0, inputs)
            self.inputs.append(inputs)

    @torch.no_grad()
    def divergence(self, dropped: Dropped, start: int) -> Mapping[str, float]:
        """The divergence of the last layer's outputs."""
        layers = executors(self.anatomy, dropped)
        states = [inputs[start] for inputs in self.inputs] if start else [call.hidden for call in self.calls]
        last = [
            run_layers(layers, call, state, start) for call, state in zip(self.calls, states, strict=True)
        ]
        return self.measure.of(self.calls, last)


@dataclass
class Search:
    """What the search works on.

    Attributes:
        anatomy: The model's layers.
        judge: Says how far a candidate moves the model.
        fitted: Batches on which replacements are fitted.
        replace: What dropped sublayers leave behind.
        taps: How many inputs a filter reads.
        advance: Called after every candidate that was judged, with the number of candidates of this round.
        singles: The divergences of candidates that are removed alone, once they are known.
        shares: How much each source counts, where there are several.
    """

    anatomy: Anatomy
    judge: Judge
    fitted: Sequence[Call]
    replace: Replace
    taps: int
    advance: Callable[[int], None]
    singles: dict[tuple[Unit, int], Mapping[str, float]] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)

    def loss(self, divergences: Mapping[str, float]) -> float:
        """What is minimised: the divergence of one source; of several what the panel's score lacks of 1.

        Of each is kept `exp(-divergence)`, the factor by which what the dense model would say becomes less likely. Half
        the mean and half the worst is the score, as of a `slimformer.evaluation.panel.Judgement`.
        """
        if len(divergences) == 1:
            (only,) = divergences.values()
            return only
        kept = {source: math.exp(-value) for source, value in divergences.items()}
        mean = sum(self.shares[source] * part for source, part in kept.items())
        return 1.0 - (mean + min(kept.values())) / 2

    def judge_alone(self, candidates: Sequence[tuple[Unit, int]]) -> None:
        """Judge every candidate by itself, into `singles`."""
        self._judged_each((), candidates)

    def next_step(self, steps: Sequence[Step], candidates: Sequence[tuple[Unit, int]]) -> Step:
        """Judge every candidate on top of the earlier `steps`, and take the best.

        Raises:
            CalibrationError: If the divergence is not a number.
        """
        judged = self._judged_each(steps, candidates)
        _, kind, layer, best = min(
            ((self.loss(of), *unit, of) for unit, of in zip(candidates, judged, strict=True)),
            key=lambda found: found[:3],
        )
        return Step.of(kind, layer, best)

    def _judged_each(
        self, steps: Sequence[Step], candidates: Sequence[tuple[Unit, int]]
    ) -> list[Mapping[str, float]]:
        if not steps and all(unit in self.singles for unit in candidates):
            return [self.singles[unit] for unit in candidates]
        before = [sublayer for step in steps for sublayer in sublayers_of(step.kind, step.layer)]
        dropped = fit_together(self.anatomy, self.fitted, before, self.replace, self.taps)
        wanted = [sublayer for unit in candidates for sublayer in sublayers_of(*unit)]
        fitted = fit_each(self.anatomy, self.fitted, wanted, dropped, self.replace, self.taps)
        self.judge.begin(dropped)
        judged: list[Mapping[str, float]] = []
        for kind, layer in candidates:
            own = {sublayer: fitted[sublayer] for sublayer in sublayers_of(kind, layer)}
            judged.append(self._judged({**dropped, **own}, layer))
            self.advance(len(candidates))
        if not steps:
            self.singles |= dict(zip(candidates, judged, strict=True))
        return judged

    def divergences_of(self, sublayers: Sequence[Sublayer]) -> Mapping[str, float]:
        """The divergence of every source with all of them dropped and their replacements fitted together."""
        return self._judged(fit_together(self.anatomy, self.fitted, sublayers, self.replace, self.taps), 0)

    def _judged(self, dropped: Dropped, start: int) -> Mapping[str, float]:
        found = self.judge.divergence(dropped, start)
        if any(value != value for value in found.values()):
            raise CalibrationError(
                "The divergence is not a number: the model computes NaN on this text. Check the checkpoint, or load "
                "it in bfloat16 or float32 instead of float16."
            )
        return found


def sublayers_of(kind: Unit, layer: int) -> tuple[Sublayer, ...]:
    """The sublayers of a unit.

    Example:
        >>> sublayers_of("block", 3)
        (('attention', 3), ('mlp', 3))
    """
    return tuple((k, layer) for k in KINDS) if kind == "block" else ((kind, layer),)


def most_removals(anatomy: Anatomy, kinds: Sequence[Unit]) -> int:
    """How many units of these kinds can go, so that what stays still counts positions."""
    gone: list[Sublayer] = []
    count = 0
    for unit in ((kind, layer) for layer in reversed(range(len(anatomy.layers))) for kind in kinds):
        more = [*gone, *sublayers_of(*unit)]
        if may_drop(anatomy, more):
            gone, count = more, count + 1
    return count


def may_drop(anatomy: Anatomy, sublayers: Sequence[Sublayer]) -> bool:
    """Whether what stays can still count positions and hold a cache."""
    gone = [index for kind, index in sublayers if kind == "attention"]
    if not anatomy.causal:
        return True
    try:
        compact_slots(anatomy.layer_types, gone)
    except PlanError:
        return False
    return True

"""Who judges proposals: one model here, or several elsewhere that are given the same to judge by."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from slimformer.calibration.drops.budgets import Budget
from slimformer.calibration.drops.calibration_text import CalibrationText
from slimformer.errors import CalibrationError
from slimformer.evaluation.panel import Panel
from slimformer.examination.tiers import support
from slimformer.model.anatomy import transformer_of
from slimformer.optimization.candidates import Candidate, Verdict
from slimformer.optimization.goals import Conditions, Workload
from slimformer.optimization.measuring.costs import Meter
from slimformer.optimization.measuring.losses import LONG_PROMPTS, Losses
from slimformer.optimization.units import Base, Proposal, methods_of
from slimformer.patching import patched, status
from slimformer.plans.plan import fingerprint


@dataclass
class Judge:
    """A model with everything that proposals are judged by.

    Attributes:
        bases: What sublayers may be dropped from, the whole model first.
        losses: The mixture.
        meter: Measures runs.
        panel: What the dense model can do.
    """

    bases: Sequence[Base]
    losses: Losses
    meter: Meter
    panel: Panel

    def base(self, name: str) -> Base:
        """The base of this name."""
        return next(base for base in self.bases if base.name == name)

    def methods(self, proposal: Proposal) -> tuple[Any, ...]:
        """What makes it; what its sublayers leave behind is fitted."""
        base = self.base(proposal.base)
        if base.replace == "nothing" or not proposal.units:
            return methods_of(base, proposal.units)
        return (*base.methods, self.losses.fitted(proposal.units, base.replace, base.taps))

    def judged(self, proposal: Proposal) -> Candidate:
        """Measure what a proposal loses and costs."""
        begun = time.monotonic()
        base, methods = self.base(proposal.base), self.methods(proposal)
        # The rows of the mixture are no prompts of which tokens leave.
        leaves = LONG_PROMPTS in base.losses
        lost = self.losses.of(methods_of(self.bases[0], proposal.units) if leaves else methods)
        if leaves:
            lost[LONG_PROMPTS] = base.losses[LONG_PROMPTS]
        with patched(self.meter.model, *methods):
            verdict = Verdict.of(self.panel.judged(self.meter.model))
        dense, cost = self.meter.estimated(methods, (time.monotonic() - begun) / 2)
        return Candidate(proposal, dense, cost, verdict, lost, methods=methods)

    def material(self) -> Material:
        """All of it but the model."""
        text = self.losses.text
        return Material(
            self.bases, fingerprint(self.losses.model), text.rows, text.source, text.sizes, text.sources, text.shares,
            self.losses.shares, self.meter.workload, self.meter.conditions, self.meter.gain,
            self.panel,
        )  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What a judge has beside its model, to be sent to where another copy of that is.

    Attributes:
        bases: As a judge has them.
        fingerprint: Of the model.
        rows: Of the mixture.
        source: Where they came from.
        sizes: How many each part reads.
        sources: The source of each.
        text_shares: How much each source of text counts.
        shares: How much each source counts, long prompts among them.
        workload: What is run.
        conditions: Lengths and batch.
        gain: How many times as fast as dense the patch alone is.
        panel: What the dense model can do.
    """

    bases: Sequence[Base]
    fingerprint: Mapping[str, Any]
    rows: dict[str, Tensor]
    source: str
    sizes: Budget
    sources: Sequence[str]
    text_shares: Mapping[str, float]
    shares: dict[str, float]
    workload: Workload
    conditions: Conditions
    gain: float | None
    panel: Panel

    def on(self, model: Any) -> Judge:
        """A judge with another copy of the model.

        Raises:
            CalibrationError: If it is another model, or patched.
        """
        inner, found = transformer_of(model), support(model)
        if fingerprint(inner) != self.fingerprint or status(model):
            raise CalibrationError(
                f"A judge was given another model ({type(inner).__name__}) than the one that is optimised, or a "
                "patched one. Load the same, unpatched."
            )
        inner.eval()
        text = CalibrationText(
            inner, found.anatomy, self.rows, self.source, self.sizes, self.sources, self.text_shares
        )
        losses = Losses.recorded(inner, found, text, self.shares)
        meter = Meter(model, found, self.workload, self.conditions, self.gain)
        return Judge(self.bases, losses, meter, self.panel)


class Judges(Protocol):
    """Judge several proposals, at the same time where they can."""

    def begin(self, judge: Judge) -> int:
        """Called once, before anything is judged.

        Returns:
            How many proposals are to be made at once.
        """
        ...

    def judged(self, proposals: Sequence[Proposal]) -> Iterable[Candidate]:
        """What each loses and costs, in the order of the proposals."""
        ...


class Here:
    """Judges one after the other, with the model that is optimised.

    Args:
        at_once: How many proposals are made before any of them is judged, as for so many judges elsewhere. The more
            these are, the less is known when each is made.

    Raises:
        CalibrationError: If that is no whole number from 1 up.
    """

    def __init__(self, at_once: int = 1) -> None:
        if isinstance(at_once, bool) or not isinstance(at_once, int) or at_once < 1:
            raise CalibrationError(f"at_once must be a whole number from 1 up, got {at_once!r}.")
        self.at_once = at_once
        self._judge: Judge | None = None

    def begin(self, judge: Judge) -> int:
        """Take the model over."""
        self._judge = judge
        return self.at_once

    def judged(self, proposals: Sequence[Proposal]) -> Iterable[Candidate]:
        """Each when it is asked for."""
        if self._judge is None:
            raise CalibrationError("Nothing is known to judge by. Call begin first.")
        return map(self._judge.judged, proposals)

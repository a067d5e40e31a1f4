"""What a repair won, source by source and capability by capability, or that it won nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.panel import Judgement, Panel, equal
from slimformer.evaluation.panel.sizes import PanelBudget
from slimformer.model.anatomy import transformer_of
from slimformer.patching import patched
from slimformer.plans.plan import Plan
from slimformer.training.attempts.minutes import Minutes

# A divergence that falls by less than this part is as it was.
LEAST = 0.01
# Differences of a capability from so many standard errors on are no accident.
_APART = 2.0


@dataclass(frozen=True)
class Judges:
    """The panel that a plan is judged by before and after its repair.

    Attributes:
        panel: Recorded with the dense model; None where there is none.
        before: Its judgement of the plan that is repaired.
        left_out: Why there is no panel though one was asked for.
    """

    panel: Panel | None = None
    before: Judgement | None = None
    left_out: str = ""

    @classmethod
    def of(
        cls,
        model: Any,
        plan: Plan,
        tokenizer: PreTrainedTokenizerBase,
        budget: PanelBudget | None,
        cache: str | os.PathLike[str] | None,
        minutes: Minutes,
    ) -> Judges:
        """Judge the plan; as much time as that took is kept back for judging it again."""
        if budget is None:
            return cls()
        inner = transformer_of(model)
        try:
            panel = Panel.recorded(inner, tokenizer, budget=budget, cache=cache)
            begun = time.monotonic()
            with patched(model, plan):
                before = panel.judged(inner)
        except (CalibrationError, DataError) as error:
            return cls(left_out=str(error))
        minutes.keep_back(time.monotonic() - begun)
        return cls(panel, before)

    def after(self, model: Any, plan: Plan) -> Judged:
        """Judge the repaired plan."""
        if self.panel is None:
            return Judged(left_out=self.left_out)
        with patched(model, plan):
            return Judged(self.before, self.panel.judged(transformer_of(model)))


@dataclass(frozen=True)
class Judged:
    """What the panel says.

    Attributes:
        before: Of the plan.
        after: Of the repaired one.
        left_out: Why it says nothing.
    """

    before: Judgement | None = None
    after: Judgement | None = None
    left_out: str = ""

    @property
    def worse(self) -> bool:
        """Whether the repaired plan keeps less, by more than the panel's spread."""
        if self.before is None or self.after is None:
            return False
        return self.after.score < self.before.score and not equal(self.before, self.after)

    @property
    def lost(self) -> list[str]:
        """Capabilities of which less is kept, by more than their spread."""
        if self.before is None or self.after is None:
            return []
        pairs = zip(self.before.capabilities, self.after.capabilities, strict=True)
        return [
            after.name
            for before, after in pairs
            if before.kept - after.kept > _APART * float((before.replicates - after.replicates).std())
        ]


@dataclass(frozen=True)
class Outcome:
    """Whether a repair won anything.

    Attributes:
        before: Mean divergence from dense on text that was not trained on, by source and `""` for all of it.
        after: The same of the repaired plan.
        judged: What the panel says.
        why: Why nothing was won; empty where something was.
    """

    before: Mapping[str, float]
    after: Mapping[str, float]
    judged: Judged
    why: str

    @classmethod
    def of(
        cls,
        before: Sequence[float],
        after: Sequence[float],
        sources: Sequence[str],
        curves: Sequence[Mapping[str, Any]],
        judged: Judged,
    ) -> Outcome:
        """From the divergence on every batch, with its source."""
        first, last = (_by_source(values, sources) for values in (before, after))
        return cls(first, last, judged, _why(first[""], last[""], curves, judged))

    @property
    def won(self) -> bool:
        """Whether it is nearer to dense, and the panel does not find it worse."""
        return not self.why

    def to_dict(self) -> dict[str, Any]:
        """For a plan's `measured`: where nothing was won, the plan keeps what it was before."""
        after, kept = (self.after, self.judged.after) if self.won else (self.before, self.judged.before)
        found: dict[str, Any] = {
            "won": self.won,
            "divergence_before": self.before[""],
            "divergence_after": after[""],
            "sources": {
                name: {"before": self.before[name], "after": after[name]} for name in self.before if name
            },
        }
        if self.why:
            found |= {"why": self.why, "divergence_tried": self.after[""]}
        elif self.judged.lost:
            found["lost"] = self.judged.lost
        if self.judged.before is not None:
            found["panel_before"] = self.judged.before.to_dict()
        if self.judged.left_out:
            found["panel_left_out"] = self.judged.left_out
        return {"repair": found, **({} if kept is None else {"panel": kept.to_dict()})}


def _by_source(values: Sequence[float], sources: Sequence[str]) -> dict[str, float]:
    found = {"": sum(values) / len(values)}
    for name in dict.fromkeys(sources):
        own = [value for value, of in zip(values, sources, strict=True) if of == name]
        found[name] = sum(own) / len(own)
    return found


def _why(before: float, after: float, curves: Sequence[Mapping[str, Any]], judged: Judged) -> str:
    rates = [
        f"{rate:.3g}"
        for curve in curves
        for rate in (*(tried["learning_rate"] for tried in curve.get("failed", ())), curve["learning_rate"])
    ]
    tried = f"learning rates tried: {', '.join(dict.fromkeys(rates))}"
    advice = "Give more text, more steps or minutes, or a higher rank."
    if not after < before * (1 - LEAST):
        steps = sum(len(curve["losses"]) for curve in curves)
        figures = f"{before:.4g} before and {after:.4g} after {steps} steps"
        return f"the divergence from dense is {figures} ({tried}). {advice}"
    if judged.worse and judged.before is not None and judged.after is not None:
        return (
            f"the divergence from dense falls from {before:.4g} to {after:.4g} on text like that it was trained on, "
            f"but the panel's score falls from {judged.before.score:.3f} to {judged.after.score:.3f}, "
            f"{judged.after.worst.name} being the worst ({tried}). Give text like that of your application, or leave "
            "data out."
        )
    return ""

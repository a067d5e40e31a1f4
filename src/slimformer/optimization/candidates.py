"""Proposals that were judged: what each keeps, how fast it is, and which of them is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slimformer.evaluation.panel import Judgement
from slimformer.optimization.goals import WORST, Wish
from slimformer.optimization.units import Proposal

_YOURS = "yours"


@dataclass(frozen=True)
class Verdict:
    """What a panel says of one plan, as the part that is lost.

    Attributes:
        lost: Of every capability, the part lost.
        spread: The standard error of each.
        yours: Whether the user's own task or prompts decide alone.
    """

    lost: Mapping[str, float]
    spread: Mapping[str, float]
    yours: bool = False

    @classmethod
    def of(cls, judgement: Judgement) -> Verdict:
        """From a panel's judgement."""
        lost = {of.name: 1.0 - of.kept for of in judgement.capabilities}
        return cls(lost, {of.name: of.spread for of in judgement.capabilities}, _YOURS in lost)

    @property
    def mean(self) -> float:
        """The mean part lost; the user's own task alone where there is one."""
        return self.lost[_YOURS] if self.yours else sum(self.lost.values()) / len(self.lost)

    @property
    def worst(self) -> str:
        """The capability that loses most; the user's own task where there is one."""
        return _YOURS if self.yours else max(self.lost, key=lambda name: self.lost[name])

    @property
    def need(self) -> float:
        """The `max_loss` that allows it: the mean, or what the worst capability asks for.

        Example:
            >>> Verdict({"text": 0.01, "copying": 0.05}, {"text": 0.0, "copying": 0.0}).need
            0.03
        """
        return round(max(self.mean, self.lost[self.worst] / (1.0 if self.yours else WORST)), 9)

    @property
    def mean_spread(self) -> float:
        """The standard error of the mean, of rows that have nothing to do with each other."""
        if self.yours:
            return self.spread[_YOURS]
        return float(sum(value**2 for value in self.spread.values())) ** 0.5 / len(self.spread)

    def to_dict(self) -> dict[str, Any]:
        """As a plan's `measured` holds it."""
        return {
            "mean_lost": self.mean,
            "spread": self.mean_spread,
            "worst": self.worst,
            "lost": dict(self.lost),
            "spreads": dict(self.spread),
            "yours": self.yours,
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Verdict:
        """What `to_dict` gave."""
        return cls(found["lost"], found["spreads"], found["yours"])


@dataclass(frozen=True)
class Candidate:
    """A plan with what was measured of it.

    Attributes:
        proposal: What it leaves out.
        dense: What the dense model costs, measured in turns with it.
        cost: What it costs: seconds of a run, or bytes.
        verdict: What the panel says.
        losses: What it loses of every source of the mixture; empty where it was not measured.
        repaired: Whether it was repaired.
        methods: What makes it; empty where it was read from partial results and has learnt weights.
    """

    proposal: Proposal
    dense: float
    cost: float
    verdict: Verdict
    losses: Mapping[str, float] = field(default_factory=dict)
    repaired: bool = False
    methods: tuple[Any, ...] = field(default=(), compare=False, repr=False)

    @property
    def speedup(self) -> float:
        """How many times as fast (or as small) as dense."""
        return self.dense / self.cost

    def fits(self, wish: Wish) -> bool:
        """Whether it is what was asked for, and faster than dense."""
        if self.speedup <= 1.0:
            return False
        if wish.max_loss is not None:
            return self.verdict.need <= wish.max_loss
        return wish.speedup is not None and self.speedup >= wish.speedup

    def to_dict(self) -> dict[str, Any]:
        """As plans and partial results hold it."""
        return {
            "what": self.proposal.words,
            "base": self.proposal.base,
            "units": [list(unit) for unit in self.proposal.units],
            "repaired": self.repaired,
            "dense": self.dense,
            "cost": self.cost,
            "speedup": self.speedup,
            "need": self.verdict.need,
            **self.verdict.to_dict(),
            "losses": dict(self.losses),
        }

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Candidate:
        """What `to_dict` gave, without its methods."""
        units = tuple((kind, layer) for kind, layer in found["units"])
        return cls(
            Proposal(found["base"], units),
            found["dense"],
            found["cost"],
            Verdict.from_dict(found),
            found["losses"],
            found["repaired"],
        )


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other is faster than at no more loss; repaired ones beside repaired ones only.

    Example:
        >>> def made(cost, lost):
        ...     return Candidate(Proposal("", ()), 1.0, cost, Verdict({"text": lost}, {"text": 0.0}))
        >>> [one.cost for one in front([made(0.5, 0.1), made(0.6, 0.2), made(0.8, 0.0)])]
        [0.5, 0.8]
    """
    return [one for one in candidates if not any(_dominates(other, one) for other in candidates)]


def best(candidates: Iterable[Candidate], wish: Wish) -> list[Candidate]:
    """Those that fit, the one to choose first: the fastest within a loss, or the least loss at a speed."""
    fitting = [one for one in candidates if one.fits(wish)]
    if wish.max_loss is not None:
        return sorted(fitting, key=lambda one: (-one.speedup, one.verdict.need))
    return sorted(fitting, key=lambda one: (one.verdict.need, -one.speedup))


def nearest(candidates: Iterable[Candidate], wish: Wish) -> Candidate | None:
    """Of those that are faster than dense and do not fit, the one that misses least; None if none is faster."""
    faster = [one for one in candidates if one.speedup > 1.0 and not one.fits(wish)]
    if wish.max_loss is not None:
        return min(faster, key=lambda one: one.verdict.need, default=None)
    return max(faster, key=lambda one: one.speedup, default=None)


def _dominates(other: Candidate, one: Candidate) -> bool:
    if other is one or other.repaired != one.repaired:
        return False
    no_worse = other.speedup >= one.speedup and other.verdict.need <= one.verdict.need
    return no_worse and (other.speedup > one.speedup or other.verdict.need < one.verdict.need)

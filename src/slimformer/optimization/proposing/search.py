"""Rounds of proposing and judging: a programme proposes, the panel judges, and what it taught is proposed by.

Puzzletron (arXiv 2411.19146) chooses by a programme over single losses; that losses of parts do not add up is what
EvoPress (2410.14649) searches by trying. Here the pairs that explain the difference go back into the programme.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from slimformer.calibration.drops.partial_results import PartialResults
from slimformer.optimization.candidates import Candidate, Verdict, best
from slimformer.optimization.goals import Wish
from slimformer.optimization.judging import Judge, Judges
from slimformer.optimization.measuring.costs import Costs
from slimformer.optimization.proposing.pairs import Curve, beyond, grown, growth, learnt_pairs
from slimformer.optimization.proposing.programme import Problem, solve, units_in
from slimformer.optimization.units import Base, Proposal, Unit, allowed, methods_of
from slimformer.training.attempts.minutes import Minutes

_logger = logging.getLogger("slimformer")
# What is aimed at, round by round: parts of the loss that is allowed. What lies around it is what the curve shows.
_AIMS = (1.0, 2.0, 0.5, 1.0, 4.0, 0.75, 1.5, 1.0, 0.9)
_SPEEDS = (1.0, 1.0, 1.1, 1.0, 0.93, 1.0, 1.2)
_HALVINGS, _MOST = 7, 40
# Rounds without a better candidate that end the search.
_PATIENCE = 12
# A wish of no loss is aimed at like this one.
_LEAST_AIM = 0.005


@dataclass
class Search:
    """What is searched with, and the candidates that were found.

    Attributes:
        units: What may be dropped.
        judge: The model here, with what it is judged by.
        judges: Who judges.
        single: What each unit costs when it alone goes, of every source.
        blocks: What attention and MLP of one layer cost together.
        costs: What each saves.
        wish: What is asked for.
        partial: Where candidates are kept.
        clock: The minutes.
        candidates: Those judged so far.
        took: Seconds that each round took.
    """

    units: Sequence[Unit]
    judge: Judge
    judges: Judges
    single: Mapping[Unit, Mapping[str, float]]
    blocks: Mapping[int, Mapping[str, float]]
    costs: Costs
    wish: Wish
    partial: PartialResults
    clock: Minutes
    candidates: list[Candidate] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    # Those of this round that are not judged yet.
    _proposed: list[Proposal] = field(default_factory=list, init=False)

    def run(self, until: float, advance: Any) -> None:
        """Propose and judge until then (by `time.monotonic`), or until nothing new is proposed."""
        self._add_plain()
        at_once = self.judges.begin(self.judge)
        # Without the whole model, which is not proposed.
        number = sum(not one.repaired for one in self.candidates) - 1
        since, leading = 0, best(self.candidates, self.wish)[:1]
        while number < _MOST and since < _PATIENCE:
            if time.monotonic() + max(self.took, default=0.0) > until and self.took:
                return
            begun = time.monotonic()
            proposals = self._round(number, min(at_once, _MOST - number))
            if not proposals:
                return
            for candidate in self.judges.judged(proposals):
                self.add(candidate)
                advance(_MOST)
                now = best(self.candidates, self.wish)[:1]
                since, leading = (since + 1 if now == leading else 0), now
            self.took.append(time.monotonic() - begun)
            number += len(proposals)

    def add(self, candidate: Candidate) -> None:
        """Keep a candidate."""
        self.candidates.append(candidate)
        self.partial.keep("candidates", [one.to_dict() for one in self.candidates])
        _logger.info(
            "Candidate %d%s: %s: %.2f times dense, loses %.1f%% on average and %.1f%% of %s; %.1f minutes left.",
            len(self.candidates) - 1,
            " (repaired)" * candidate.repaired,
            candidate.proposal.words,
            candidate.speedup,
            100 * candidate.verdict.mean,
            100 * candidate.verdict.lost[candidate.verdict.worst],
            candidate.verdict.worst,
            max(self.clock.seconds / 60 - self.clock.used, 0.0),
        )

    def methods(self, candidate: Candidate) -> tuple[Any, ...]:
        """What makes a candidate; fitted again where it was read from partial results."""
        return candidate.methods or self.judge.methods(candidate.proposal)

    def _round(self, number: int, count: int) -> list[Proposal]:
        """What is judged next, all of it proposed by what is known now."""
        self._proposed = []
        for place in range(number, number + count):
            proposal = self.propose(place)
            if proposal is None or proposal in self._proposed:
                break
            self._proposed.append(proposal)
        return self._proposed

    def propose(self, number: int) -> Proposal | None:
        """What is to be judged next; None where there is nothing new."""
        if self.wish.speedup is not None:
            speed = self.wish.speedup * _SPEEDS[number % len(_SPEEDS)]
            found = self._cheaper_than(self.costs.dense / speed / self._slower())
            return None if found is None else found[1]
        return self.within(max(self.wish.max_loss or 0.0, _LEAST_AIM) * _AIMS[number % len(_AIMS)])

    def within(self, need: float) -> Proposal | None:
        """The fastest that is predicted to lose so much at most; failing that, what is predicted to lose least."""
        low = min(self.costs.of(base, self._free(base)) for base in self.judge.bases)
        high, found, nearest = self.costs.plain, None, None
        for _ in range(_HALVINGS):
            middle = (max(low, 0.0) + high) / 2
            tried = self._cheaper_than(middle)
            if tried is not None and tried[0] <= need:
                found, high = tried[1], middle
            else:
                low = middle
                if tried is not None and (nearest is None or tried[0] < nearest[0]):
                    nearest = tried
        return found or (None if nearest is None else nearest[1])

    def _cheaper_than(self, cost: float) -> tuple[float, Proposal] | None:
        """The proposal of least predicted loss that costs so much at most, and that loss."""
        usual, needs = self._growth(), self._needs()
        learnt, least = self._pairs(), None
        for base in self.judge.bases:
            units = self._free(base)
            problem = self._problem(base, units, learnt)
            if least is not None and problem.loss(()) >= least[0]:
                continue
            choice = self._solved(problem, units, base.cost - cost)
            if choice is None:
                continue
            loss = problem.loss(choice)
            if least is None or loss < least[0]:
                least = loss, Proposal(base.name, units_in(choice, units))
        if least is None:
            return None
        return needs(grown(usual, least[0])), least[1]

    def _solved(self, problem: Problem, units: Sequence[Unit], least: float) -> frozenset[int] | None:
        """As `solve`, without what leaves a decoder no attention to count positions by."""
        excluded = set(problem.excluded)
        while True:
            choice = solve(Problem(problem.saved, problem.losses, problem.shares, problem.pairs, problem.before,
                                   excluded), least)  # fmt: skip
            if choice is None or allowed(self.judge.losses.support, units_in(choice, units)):
                return choice
            excluded.add(choice)

    def _problem(self, base: Base, units: Sequence[Unit], learnt: dict[tuple[int, int], Tensor]) -> Problem:
        place = {unit: index for index, unit in enumerate(units)}
        own = {index: place[unit] for index, unit in enumerate(self.units) if unit in place}
        pairs = {}
        for (first, second), more in learnt.items() if base.single else (self._of_blocks() | learnt).items():
            if first in own and second in own:
                pairs[own[first], own[second]] = more
        known = [*(one.proposal for one in self.candidates if not one.repaired), *self._proposed]
        excluded = [
            frozenset(place[unit] for unit in one.units)
            for one in known
            if one.base == base.name and set(one.units) <= set(place)
        ]
        losses = [self._alone(base, unit) for unit in units]
        return Problem(
            torch.tensor([self.costs.saved_by(base, unit) for unit in units], dtype=torch.float64),
            torch.stack(losses, 1)
            if losses
            else torch.zeros(len(self.judge.losses.shares), 0, dtype=torch.float64),
            torch.tensor(list(self.judge.losses.shares.values()), dtype=torch.float64),
            pairs,
            self.judge.losses.vector(base.losses),
            excluded,
        )

    def _pairs(self) -> dict[tuple[int, int], Tensor]:
        """What pairs cost beyond their sum, as far as what was judged tells."""
        judged = self._judged()
        more = beyond([sums for _, sums, _ in judged], [lost for _, _, lost in judged])
        chosen = [(chosen, of) for (chosen, _, _), of in zip(judged, more, strict=True)]
        return learnt_pairs(chosen, self._of_blocks())

    def _of_blocks(self) -> dict[tuple[int, int], Tensor]:
        place = {unit: index for index, unit in enumerate(self.units)}
        found = {}
        for layer, both in self.blocks.items():
            first: Unit = ("attention", layer)
            second: Unit = ("mlp", layer)
            each = self.judge.losses.vector(self.single[first]) + self.judge.losses.vector(
                self.single[second]
            )
            found[place[first], place[second]] = self.judge.losses.vector(both) - each
        return found

    def _judged(self) -> list[tuple[frozenset[int], Tensor, Tensor]]:
        """Of every unrepaired candidate the units, the sum of their losses, and what it lost."""
        place = {unit: index for index, unit in enumerate(self.units)}
        blocks, found = self._of_blocks(), []
        for one in self.candidates:
            if one.repaired or not one.losses or not (one.proposal.units or one.proposal.base):
                continue
            chosen = frozenset(place[unit] for unit in one.proposal.units)
            base = self.judge.base(one.proposal.base)
            total = self.judge.losses.vector(base.losses)
            total = total + sum(self._alone(base, unit) for unit in one.proposal.units)
            if not base.single:
                total = total + sum(more for pair, more in blocks.items() if set(pair) <= chosen)
            found.append((chosen, total, self.judge.losses.vector(one.losses)))
        return found

    def _growth(self) -> tuple[float, float]:
        judged = self._judged()
        return growth([sums for _, sums, _ in judged], [lost for _, _, lost in judged])

    def _needs(self) -> Curve:
        """From what is lost on the mixture to what the panel says."""
        plain = [one for one in self.candidates if not one.repaired and one.losses]
        return Curve.through([(self.judge.losses.scalar(one.losses), one.verdict.need) for one in plain])

    def _slower(self) -> float:
        """By how much candidates cost more than the sum of their parts says."""
        found = [
            one.cost
            / one.dense
            * self.costs.dense
            / self.costs.of(self.judge.base(one.proposal.base), one.proposal.units)
            for one in self.candidates
            if not one.repaired and self.costs.of(self.judge.base(one.proposal.base), one.proposal.units) > 0
        ]
        return median(found) if found else 1.0

    def _add_plain(self) -> None:
        """The whole model under the patch: what loses nothing."""
        if any(not one.proposal.units and not one.proposal.base for one in self.candidates):
            return
        names = [capability.name for capability in self.judge.panel.capabilities]
        nothing = Verdict(dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0), "yours" in names)
        methods = methods_of(self.judge.bases[0], ())
        self.add(Candidate(Proposal("", ()), self.costs.dense, self.costs.plain, nothing, methods=methods))

    def _alone(self, base: Base, unit: Unit) -> Tensor:
        return self.judge.losses.vector((base.single or self.single)[unit])

    def _free(self, base: Base) -> list[Unit]:
        return [unit for unit in self.units if unit not in base.whole]

"""How much to draft: as long as the chance that a token is accepted is worth more time than drafting it takes.

Everything is measured while text is generated, since it depends on the machine, the plan and the text: what a step, a
drafted token and a checked one cost, and how often a draft that was so sure of itself was right.
"""

from __future__ import annotations

import bisect
from collections import deque
from dataclasses import dataclass, field
from statistics import median

# How sure of a token a draft is: bounds between the groups in which its acceptance is counted.
_BOUNDS = (0.3, 0.6, 0.85, 0.97)
# Acceptance of each group before anything was counted, and as how many tokens that counts.
_EXPECTED, _WEIGHT = (0.2, 0.45, 0.7, 0.9, 0.97), 4.0
# What was counted loses this part of its weight with every round.
_DECAY = 0.98
# Rounds before a first verdict, and steps without drafts after a bad one: twice as many after each in a row.
_TRIAL, _FIRST_REST, _LONGEST_REST = 3, 32, 1024
# The rest that a new text ends.
_REST_OF_TEXTS = 128
# What a checked token costs before that was measured, as a part of a step.
_CHECKING = 0.2
# With the token behind them as many as one tile of a matrix product has rows.
LONGEST = 15


class Typical:
    """The median of the last times, which one interruption does not move."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=15)

    def add(self, seconds: float) -> None:
        """Count one more."""
        self._last.append(seconds)

    @property
    def value(self) -> float | None:
        """The median; None before the first."""
        return median(self._last) if self._last else None


@dataclass
class Ratio:
    """How many of so many, the newest counting most."""

    hits: float
    of: float

    def add(self, hits: float, of: float) -> None:
        """Count more."""
        self.hits, self.of = self.hits * _DECAY + hits, self.of * _DECAY + of

    @property
    def value(self) -> float:
        """The part of them."""
        return self.hits / self.of


def prior() -> list[Ratio]:
    """What is expected of a draft, by how sure it is, before anything was counted."""
    return [Ratio(part * _WEIGHT, _WEIGHT) for part in _EXPECTED]


@dataclass
class Pace:
    """Decides about drafts by what they cost and how often they are right.

    Attributes:
        step: Seconds of a step that checks nothing.
        drafting: Seconds of a drafted token.
        checking: Seconds more that a step takes for every token that it checks.
        accepted: The part of drafted tokens that was accepted, by how sure the draft was.
        copied: The part of looked-up tokens that was accepted.
        resting: How many more steps are taken without drafts.
    """

    step: Typical = field(default_factory=Typical)
    drafting: Typical = field(default_factory=Typical)
    checking: Typical = field(default_factory=Typical)
    accepted: list[Ratio] = field(default_factory=prior)
    copied: Ratio = field(default_factory=lambda: Ratio(2.0, 3.0))
    resting: int = 0
    _rest: int = _FIRST_REST
    _skipped_copies: int = 0
    # Tokens and seconds of the rounds with drafts since the last rest.
    _rounds: int = 0
    _tokens: float = 0.0
    _seconds: float = 0.0

    def begin(self) -> None:
        """A new text: where drafts did not pay lately, some steps show first what a step takes."""
        self.resting = min(self.resting, _REST_OF_TEXTS)

    @property
    def drafts(self) -> bool:
        """Whether this round drafts; what a step takes is measured first."""
        if self.step.value is None:
            return False
        if self.resting > 0:
            self.resting -= 1
            return False
        return True

    def goes_on(self, chance: float) -> bool:
        """Whether one more token is worth drafting.

        Args:
            chance: That all tokens drafted so far are accepted.
        """
        step, drafting = self.step.value, self.drafting.value
        if step is None or drafting is None:
            return False
        expected = sum(r.hits for r in self.accepted) / sum(r.of for r in self.accepted)
        return chance * expected * self._seconds_per_token(step) > drafting + self._checking(step)

    def chance(self, confidence: float) -> float:
        """How often tokens were accepted of which the draft was so sure."""
        return self.accepted[group_of(confidence)].value

    def copies(self) -> int:
        """How many tokens of an earlier continuation to check; 0 where so few are right that it does not pay."""
        step = self.step.value
        if step is None:
            return 0
        cost = self._checking(step) / self._seconds_per_token(step)
        length, chance = 0, self.copied.value
        while length < LONGEST and chance > cost:
            length, chance = length + 1, chance * self.copied.value
        if length == 0:
            # Now and then, since texts change.
            self._skipped_copies += 1
            return int(self._skipped_copies % LONGEST == 0)
        return length

    def checked(
        self, confidences: list[float], copied: int, accepted: int, drafting: float, checking: float
    ) -> None:
        """Count a round.

        Args:
            confidences: How sure the draft was of each of its tokens.
            copied: How many tokens were looked up instead.
            accepted: How many of all were accepted.
            drafting: Seconds that the draft took.
            checking: Seconds of the step.
        """
        tried = len(confidences) or copied
        if not tried:
            self.step.add(checking)
            return
        step = self.step.value or checking
        self.checking.add(max(checking - step, 0.0) / tried)
        if copied:
            # Tokens behind the first wrong one say nothing.
            self.copied.add(accepted, min(accepted + 1, copied))
            return
        self.drafting.add(drafting / tried)
        for place, confidence in enumerate(confidences[: accepted + 1]):
            self.accepted[group_of(confidence)].add(float(place < accepted), 1.0)
        self._rounds += 1
        self._tokens += accepted + 1
        self._seconds += drafting + checking
        # Once drafts did not pay, one more has to show that they do.
        if self._rounds >= (_TRIAL if self._rest == _FIRST_REST else 1):
            self._judge(step)

    def _judge(self, step: float) -> None:
        if self._tokens * step < self._seconds:
            self.resting, self._rest = self._rest, min(2 * self._rest, _LONGEST_REST)
            self._rounds, self._tokens, self._seconds = 0, 0.0, 0.0
        elif self._rounds >= 4 * _TRIAL:
            self._rest = _FIRST_REST
            self._rounds, self._tokens, self._seconds = (
                self._rounds // 2,
                self._tokens / 2,
                self._seconds / 2,
            )

    def _checking(self, step: float) -> float:
        known = self.checking.value
        return _CHECKING * step if known is None else known

    def _seconds_per_token(self, step: float) -> float:
        """At the best pace that is known: without drafts, or with them."""
        return min(step, self._seconds / self._tokens) if self._rounds >= _TRIAL else step


def group_of(confidence: float) -> int:
    """In which group a token is counted of which the draft is so sure."""
    return bisect.bisect_right(_BOUNDS, confidence)

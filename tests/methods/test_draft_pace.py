"""How much is drafted follows from what drafts cost and how often they are right."""

from __future__ import annotations

import random

import pytest

from slimformer.methods.speculation.pace import Pace


def time_per_token(right: float, cost: float, checking: float, tokens: int = 400, sure: float = 0.9) -> float:
    """Generate on paper: seconds per token where a step takes one, with drafts that are right so often."""
    pace, chances, time, done = Pace(), random.Random(3), 0.0, 0
    while done < tokens:
        confidences: list[float] = []
        if pace.drafts:
            chance = 1.0
            while len(confidences) < 16:
                confidences.append(sure)
                chance *= pace.chance(sure)
                if not pace.goes_on(chance):
                    break
        accepted = 0
        while accepted < len(confidences) and chances.random() < right:
            accepted += 1
        drafting, check = cost * len(confidences), 1.0 + checking * len(confidences)
        pace.checked(confidences, 0, accepted, drafting, check)
        time, done = time + drafting + check, done + accepted + 1
    return time / done


@pytest.mark.parametrize(("right", "cost"), [(0.0, 0.7), (0.3, 0.5), (0.6, 0.7)])
def test_a_draft_that_does_not_pay_costs_next_to_nothing(right: float, cost: float) -> None:
    assert time_per_token(right, cost, 0.05) < 1.03


def test_a_draft_that_pays_is_used() -> None:
    assert time_per_token(0.97, 0.4, 0.02) < 0.6


def test_cheaper_drafts_go_further() -> None:
    lengths = []
    for cost in (0.1, 0.5):
        pace = Pace()
        pace.checked([], 0, 0, 0.0, 1.0)
        for _ in range(30):
            pace.checked([0.99], 0, 1, cost, 1.02)
        chance, length = 1.0, 0
        while length < 40 and pace.goes_on(chance):
            chance, length = chance * 0.9, length + 1
        lengths.append(length)
    assert lengths[0] > lengths[1] > 0


def test_copies_that_are_never_right_are_no_longer_checked() -> None:
    pace = Pace()
    pace.checked([], 0, 0, 0.0, 1.0)
    copied = 0
    for _ in range(100):
        length = pace.copies()
        copied += length
        pace.checked([], length, 0, 0.0, 1.0 + 0.1 * length)
    assert copied < 40
    for _ in range(30):
        pace.checked([], 4, 4, 0.0, 1.4)
    assert pace.copies() > 8

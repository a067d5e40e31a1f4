"""The programme beside every choice tried, and what judged proposals teach it."""

from __future__ import annotations

import importlib
from itertools import chain, combinations

import pytest
import torch

from slimformer.errors import SlimformerError
from slimformer.optimization.proposing.pairs import Curve, beyond, grown, growth, learnt_pairs
from slimformer.optimization.proposing.programme import Problem, check_solver, solve


def a_problem(seed: int, units: int = 8, sources: int = 3, pairs: int = 6) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    both = list(combinations(range(units), 2))
    drawn = torch.randperm(len(both), generator=generator)[:pairs].tolist()
    return Problem(
        saved=torch.rand(units, generator=generator, dtype=torch.float64),
        losses=torch.rand(sources, units, generator=generator, dtype=torch.float64),
        shares=torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64),
        # Some pairs cost more than their sum, some less.
        pairs={both[i]: torch.randn(sources, generator=generator, dtype=torch.float64) / 4 for i in drawn},
        before=torch.rand(sources, generator=generator, dtype=torch.float64) / 10,
    )


def every_choice(problem: Problem, least: float) -> list[frozenset[int]]:
    units = range(len(problem.saved))
    subsets = chain.from_iterable(combinations(units, size) for size in range(len(units) + 1))
    return [
        frozenset(of)
        for of in subsets
        if float(problem.saved[list(of)].sum()) >= least and frozenset(of) not in problem.excluded
    ]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_no_choice_that_saves_enough_loses_less(seed: int, part: float) -> None:
    problem = a_problem(seed)
    least = part * float(problem.saved.sum())
    found = solve(problem, least)
    assert found is not None
    assert float(problem.saved[sorted(found)].sum()) >= least - 1e-9
    best = min(problem.loss(choice) for choice in every_choice(problem, least))
    assert problem.loss(found) == pytest.approx(best, rel=1e-3, abs=1e-6)


def test_a_choice_that_is_excluded_is_not_given_again() -> None:
    problem = a_problem(0)
    first = solve(problem, 1.5)
    assert first is not None
    again = Problem(problem.saved, problem.losses, problem.shares, problem.pairs, problem.before, [first])
    second = solve(again, 1.5)
    assert second is not None
    assert second != first
    best = min(again.loss(choice) for choice in every_choice(again, 1.5))
    assert again.loss(second) == pytest.approx(best, rel=1e-3)


def test_the_same_problem_has_the_same_solution() -> None:
    assert solve(a_problem(3), 2.0) == solve(a_problem(3), 2.0)


def test_more_than_all_units_save_is_refused() -> None:
    problem = a_problem(1)
    assert solve(problem, float(problem.saved.sum()) + 0.1) is None


def test_a_pair_that_costs_more_than_its_sum_is_found_and_avoided() -> None:
    single = torch.tensor([[0.1, 0.11, 0.15]], dtype=torch.float64)
    judged = [({0, 1}, torch.tensor([0.8])), ({0, 2}, torch.tensor([0.0])), ({1, 2}, torch.tensor([0.0]))]
    pairs = learnt_pairs(judged, known=[])
    assert float(pairs[0, 1]) == pytest.approx(0.8, rel=0.1)
    ones = torch.ones(3, dtype=torch.float64)
    share, nothing = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    assert solve(Problem(ones, single, share, {}, nothing), 2.0) == {0, 1}
    assert solve(Problem(ones, single, share, pairs, nothing), 2.0) == {0, 2}


def test_a_pair_that_was_measured_is_not_learnt() -> None:
    assert learnt_pairs([({0, 1}, torch.tensor([0.5]))], known=[(0, 1)]) == {}


def test_losses_that_grow_alike_leave_nothing_to_learn() -> None:
    sums = [torch.tensor([0.1, 0.2]), torch.tensor([0.4, 0.8]), torch.tensor([1.0, 2.0])]
    lost = [2.0 * own**1.5 for own in sums]
    factor, exponent = growth(sums, lost)
    assert (factor, exponent) == (pytest.approx(2.0, rel=1e-4), pytest.approx(1.5, rel=1e-4))
    assert all(float(more.abs().max()) < 1e-4 for more in beyond(sums, lost))
    assert grown((factor, exponent), 0.4) == pytest.approx(float(lost[1][0]), rel=1e-4)


def test_a_curve_goes_through_what_was_seen_and_back() -> None:
    curve = Curve.through([(0.4, 0.1), (0.1, 0.02), (1.0, 0.5)])
    assert [curve(x) for x in (0.1, 0.4, 1.0)] == pytest.approx([0.02, 0.1, 0.5])
    for value in (0.01, 0.05, 0.3, 2.0):
        assert curve.inverse(curve(value)) == pytest.approx(value, rel=1e-6)


def test_without_scipy_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def absent(name: str, *rest: object) -> object:
        if name.startswith("scipy"):
            raise ModuleNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(SlimformerError, match=r"slimformer\[optimize\]"):
        check_solver()

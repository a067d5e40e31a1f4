"""What loses somewhat too much is repaired, judged as all others are, and compared with what was repaired."""

from __future__ import annotations

from typing import Any

import pytest
from tests.optimization.conftest import TEXTS, strong

import slimformer
from slimformer.methods import WeightDelta
from slimformer.optimization import repaired
from slimformer.training.loop import TrainingSettings

QUICK: dict[str, Any] = {"goal": "memory", "data": TEXTS, "minutes": 4, "prompt": 32}


@pytest.fixture
def short_repairs(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Repairs of a few steps, and what each was asked for."""
    asked: list[dict[str, Any]] = []

    def short(model: Any, plan: Any, tokenizer: Any, **options: Any) -> Any:
        asked.append(options)
        settings = TrainingSettings(steps=8, rows=4, learning_rate=3e-3)
        return slimformer.repair(
            model, plan, tokenizer, **{**options, "minutes": None, "length": 64}, settings=settings, every=4
        )

    monkeypatch.setattr(repaired, "repair", short)
    monkeypatch.setattr(repaired, "_LEAST", {"cpu": 0.01})
    return asked


def test_a_candidate_that_loses_too_much_is_repaired_and_judged_again(
    model: Any, tokenizer: Any, short_repairs: list[dict[str, Any]]
) -> None:
    plan = slimformer.optimize(model, tokenizer, max_loss=0.2, **QUICK)
    candidates = plan.measured["optimize"]["candidates"]
    better = [entry for entry in candidates if entry["repaired"]]
    assert 1 <= len(better) <= len(short_repairs) <= 3
    for entry in better:
        (before,) = [one for one in candidates if one["units"] == entry["units"] and not one["repaired"]]
        # What it saves stays, and it is judged on the same rows.
        assert entry["cost"] == pytest.approx(before["cost"], rel=0.05)
        assert entry["lost"].keys() == before["lost"].keys()
    if any(entry["chosen"] for entry in better):
        assert any(isinstance(method, WeightDelta) for method in plan.methods)


def test_the_first_of_three_repairs_has_a_third_of_what_is_left_at_most(
    model: Any, tokenizer: Any, short_repairs: list[dict[str, Any]]
) -> None:
    slimformer.optimize(model, tokenizer, max_loss=0.2, **QUICK)
    assert 0 < short_repairs[0]["minutes"] <= QUICK["minutes"] / 3
    assert all(options["panel"] is None for options in short_repairs)


def test_where_there_is_no_time_to_repair_it_is_said(model: Any, tokenizer: Any) -> None:
    plan = slimformer.optimize(model, tokenizer, max_loss=0.2, **QUICK)
    (note,) = plan.measured["optimize"]["notes"]
    assert note.startswith("Nothing was repaired: a repair takes 4 minutes or more here")


def test_repair_that_is_not_wanted_is_not_made(tokenizer: Any, short_repairs: list[dict[str, Any]]) -> None:
    plan = slimformer.optimize(strong(), tokenizer, max_loss=0.2, repair=False, **QUICK)
    assert short_repairs == []
    assert plan.measured["optimize"]["notes"] == ["Nothing was repaired: repair was not asked for"]

"""What is left in the place of sublayers: what it costs, that it is fitted for what is judged, and going on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.optimization.conftest import TEXTS, strong
from tests.optimization.test_costs import meter

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.errors import SlimformerWarning
from slimformer.optimization.goals import weight_bytes
from slimformer.optimization.judging import Judge
from slimformer.optimization.measuring import replacing
from slimformer.optimization.measuring.costs import Costs
from slimformer.optimization.measuring.losses import Losses
from slimformer.optimization.units import Proposal, droppable

QUICK: dict[str, Any] = {"goal": "memory", "data": TEXTS, "minutes": 4, "prompt": 32, "repair": False}


@pytest.fixture(autouse=True)
def fits_in_few_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replacing, "_MINUTES", {"cpu": 1.0})


def told(plan: Plan) -> dict[str, Any]:
    return dict(plan.measured["optimize"])


def test_filters_and_means_cost_their_bytes(model: Any) -> None:
    by = meter(model, "memory")
    units = droppable(model, by.support)
    nothing = by.costs(units, 1.0)
    for replace, taps, kept in (
        ("mean", 1, 32),
        ("filter", 1, 32 + 32 * 32),
        ("filter", 3, 32 + 3 * 32 * 32),
    ):
        found = by.costs(units, 1.0, replace, taps)
        assert nothing.saved["attention", 1] - found.saved["attention", 1] == 4 * kept
    # An MLP reads its own token only.
    assert by.costs(units, 1.0, "filter", 3).saved["mlp", 1] == nothing.saved["mlp", 1] - 4 * (32 + 32 * 32)


def test_what_a_plan_with_filters_holds_is_counted(model: Any) -> None:
    by = meter(model, "memory")
    weights = {"attention.1.weight": torch.zeros(32, 32), "attention.1.bias": torch.zeros(32)}
    dropped = LayerDrop(attention=[1], replace="filter", weights=weights)
    _, plain = by.compared((LayerDrop(attention=[1]),), 1.0)
    _, slim = by.compared((dropped,), 1.0)
    assert slim - plain == 4 * (32 * 32 + 32)
    assert slim < weight_bytes(model) + 10**6


def test_what_saves_little_is_not_left(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by = meter(model, "generate")
    units = droppable(model, by.support)
    costs = Costs(10.0, 9.0, dict.fromkeys(units, 1.0))
    # Filters of attentions read as much as these do; those of MLPs a tenth. The machine has become half as slow again.
    saved = {unit: 0.0 if unit[0] == "attention" else 1.8 for unit in units}
    monkeypatch.setattr(by, "costs", lambda *asked: Costs(20.0, 18.0, saved))
    asked: list[Any] = []

    class Known:
        def __init__(self) -> None:
            self.model = model

        def alone(self, units: Any, known: Any, advance: Any, replace: str, taps: int) -> Any:
            asked.append((replace, len(units)))
            return {unit: {"text": 0.1} for unit in units}

    losses: Any = Known()
    found = list(replacing.replacing_bases(losses, by, costs, units, 1.0, lambda _: None, {}))
    assert asked == [("filter", 4), ("mean", 8)]
    assert found[0].whole == {unit for unit in units if unit[0] == "attention"}
    assert costs.of(found[0], [("mlp", 2)]) == pytest.approx(9.0 - 0.9)
    assert costs.of(found[1], [("attention", 2)]) == pytest.approx(8.0)


def test_plans_with_something_left_are_tried_and_fitted_for_what_they_drop(
    model: Any, tokenizer: Any
) -> None:
    plan = slimformer.optimize(model, tokenizer, max_loss=0.9, **QUICK)
    names = {entry["base"] for entry in told(plan)["candidates"]}
    assert names & {"filters left", "means left"}


def test_where_no_text_is_left_to_fit_on_nothing_is_left_behind(
    model: Any, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "slimformer")
    few = tmp_path / "few.txt"
    few.write_text(" ".join(TEXTS)[:800])
    given = {**QUICK, "data": {str(few): 1.0}, "hold_out": False}
    with pytest.warns(SlimformerWarning, match="mostly chance"):
        plan = slimformer.optimize(model, tokenizer, max_loss=0.9, **given)
    assert {entry["base"] for entry in told(plan)["candidates"]} == {""}
    assert "Nothing is tried with filters left: All" in caplog.text
    assert "none is left to fit replacements on" in caplog.text


def test_filters_keep_more_than_nothing_in_the_same_place(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = strong()
    judges: list[Judge] = []
    material = Judge.methods

    def kept(self: Judge, proposal: Proposal) -> Any:
        judges.append(self)
        return material(self, proposal)

    monkeypatch.setattr(Judge, "methods", kept)
    slimformer.optimize(model, tokenizer, max_loss=0.9, **QUICK)
    judge, units = judges[0], (("attention", 1), ("attention", 2), ("mlp", 3))
    lost = {}
    for name in ("", "means left", "filters left"):
        (method,) = judge.methods(Proposal(name, units))
        assert (method.attention, method.mlp) == ((1, 2), (3,))
        lost[name] = judge.losses.scalar(judge.losses.of((method,)))
    assert lost["filters left"] < lost["means left"] < lost[""]


def test_what_was_fitted_is_not_fitted_again_after_a_stop(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = slimformer.optimize(model, tokenizer, max_loss=0.9, checkpoint=tmp_path, **QUICK)
    monkeypatch.setattr(Losses, "alone", _of_none)
    plan = slimformer.optimize(model, tokenizer, max_loss=0.9, checkpoint=tmp_path, **QUICK)
    assert told(plan)["candidates"] == told(whole)["candidates"]
    assert plan.methods == whole.methods
    for method, same in zip(plan.methods, whole.methods, strict=True):
        for name, tensor in method.tensors().items():
            torch.testing.assert_close(tensor, same.tensors()[name])


def _of_none(self: Any, units: Any, *rest: Any) -> Any:
    raise AssertionError("every unit had been judged")

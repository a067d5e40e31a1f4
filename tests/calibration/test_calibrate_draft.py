"""The draft that is chosen is the one with which tokens take least time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slimformer
from slimformer import LayerDrop, SelfSpeculation
from slimformer.calibration.drafts import draft
from slimformer.calibration.drafts.costs import Costs
from slimformer.calibration.drafts.trial import Guesses, trial
from slimformer.errors import CalibrationError, DataError
from tiny_models import tiny_model


class Letters:
    """A tokenizer of letters."""

    chat_template = None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 60 for letter in text[:12]]}


@pytest.fixture
def model() -> Any:
    """Layers 1 and 2 do nothing, so that a draft without them is never wrong."""
    found = tiny_model("llama")
    with torch.no_grad():
        for layer in found.model.layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return found


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    # A tiny model's own times say nothing.
    monkeypatch.setattr(draft, "measure_costs", lambda model, anatomy: Costs(1.0, 0.1, 0.1, 0.02))


def calibrated(model: Any, **options: Any) -> Any:
    return slimformer.calibrate(
        model, Letters(), SelfSpeculation, **{"prompts": 3, "new_tokens": 20, **options}
    )


@pytest.mark.usefixtures("cheap")
def test_what_does_nothing_is_left_out_and_the_plan_drafts(model: Any) -> None:
    plan = calibrated(model)
    (dropping,) = plan.methods
    assert isinstance(dropping, LayerDrop)
    assert {1, 2} <= set(dropping.dropped("attention"))
    assert {1, 2} <= set(dropping.dropped("mlp"))
    assert plan.measured["draft"]["time"] < 0.9
    ids = torch.tensor([[5, 6, 7]])
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    slimformer.patch(model, SelfSpeculation(plan))
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), expected)


def test_no_draft_is_better_than_one_that_does_not_pay(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft, "measure_costs", lambda model, anatomy: Costs(1.0, 0.001, 0.001, 0.02))
    with pytest.raises(CalibrationError, match="No draft of LlamaModel is worth having"):
        calibrated(model)


def test_costs_are_measured(model: Any) -> None:
    with pytest.MonkeyPatch.context() as any_draft:
        any_draft.setattr(draft, "_LEAST_WON", -99.0)
        plan = calibrated(model, drop=2, data=["one prompt", "and another"], kinds=("block",))
    assert len(plan.methods[0].block) >= 1
    assert plan.provenance["costs"]["step"] > 0


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [({"kinds": ("head",)}, CalibrationError, "kinds takes"), ({"prompts": 0}, CalibrationError, "prompts takes"),
     ({"data": []}, DataError, "No prompt"), ({"data": "text"}, DataError, "list of prompts")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_wrong_arguments_are_refused(model: Any, options: dict[str, Any], error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        calibrated(model, **options)


def test_a_patched_model_is_refused(model: Any) -> None:
    with pytest.raises(CalibrationError, match="patched"):
        calibrated(slimformer.patch(model))


def test_time_on_paper_counts_draft_and_checks() -> None:
    half = Guesses([True, False] * 40, [0.99, 0.1] * 40)
    # Sure guesses are right: a round checks both, and gives two tokens.
    found = trial([half], cost=0.3, checking=0.05)
    assert found.time == pytest.approx((1 + 0.35) / 2, abs=0.2)
    assert trial([half], cost=0.9, checking=0.05).time > found.time

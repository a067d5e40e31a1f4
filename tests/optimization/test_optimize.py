"""From a model and a wish to a plan: what is chosen, what is said where nothing fits, and going on after a stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.optimization.conftest import ROUNDS, TEXTS, strong

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.errors import CalibrationError, DataError
from slimformer.optimization import preparation
from slimformer.optimization.candidates import Candidate, Verdict, best, front, nearest
from slimformer.optimization.goals import Wish
from slimformer.optimization.judging import Here, Judge
from slimformer.optimization.measuring import losses as losses_module
from slimformer.optimization.measuring.costs import Costs
from slimformer.optimization.units import Proposal
from slimformer.patching import patched

QUICK: dict[str, Any] = {"goal": "memory", "data": TEXTS, "minutes": 3, "prompt": 32, "repair": False}


def told(plan: Plan) -> dict[str, Any]:
    return dict(plan.measured["optimize"])


def one(cost: float, lost: float, worst: float | None = None, repaired: bool = False) -> Candidate:
    of = {"text": lost, "copying": lost if worst is None else worst}
    name = Proposal(f"{cost}", ())
    return Candidate(name, 1.0, cost, Verdict(of, dict.fromkeys(of, 0.0)), repaired=repaired)


def test_the_smallest_within_the_loss_is_chosen_and_the_model_left_alone(model: Any, tokenizer: Any) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan = slimformer.optimize(model, tokenizer, max_loss=0.9, **QUICK)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())
    found = told(plan)
    assert found["won"] is True
    (chosen,) = [entry for entry in found["candidates"] if entry["chosen"]]
    assert chosen["speedup"] > 1
    assert chosen["need"] <= 0.9
    assert len(found["candidates"]) == 1 + ROUNDS
    # What is said of it was measured on other rows than it was chosen by.
    assert found["verdict"]["lost"] == chosen["lost"]
    assert plan.measured["panel"]["mean"] == pytest.approx(1 - chosen["mean_lost"])
    with patched(model, plan):
        assert sum("dropped" in of.values() for of in slimformer.status(model).values())


def test_a_plan_is_read_again_with_all_that_was_tried(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    plan = slimformer.optimize(model, tokenizer, max_loss=0.9, **QUICK)
    plan.save_pretrained(tmp_path)
    again = Plan.from_pretrained(tmp_path)
    assert again.methods == plan.methods
    assert told(again) == json.loads(json.dumps(told(plan)))


def test_the_same_seed_gives_the_same_plan_and_the_same_candidates(model: Any, tokenizer: Any) -> None:
    plans = [slimformer.optimize(model, tokenizer, max_loss=0.9, seed=1, **QUICK) for _ in range(2)]
    assert plans[0].methods == plans[1].methods
    assert told(plans[0])["candidates"] == told(plans[1])["candidates"]


def test_proposals_of_one_round_differ_and_are_all_judged(model: Any, tokenizer: Any) -> None:
    plan = slimformer.optimize(model, tokenizer, max_loss=0.9, judges=Here(2), **QUICK)
    tried = [str(entry["units"]) for entry in told(plan)["candidates"]]
    assert len(set(tried)) == len(tried) == 1 + ROUNDS


def test_what_was_interrupted_goes_on_where_it_stopped(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = slimformer.optimize(model, tokenizer, max_loss=0.9, **QUICK)
    judged = Judge.judged
    count = []

    def interrupted(self: Judge, proposal: Proposal) -> Candidate:
        count.append(proposal)
        if len(count) == 2:
            raise KeyboardInterrupt
        return judged(self, proposal)

    monkeypatch.setattr(Judge, "judged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        slimformer.optimize(model, tokenizer, max_loss=0.9, checkpoint=tmp_path, **QUICK)
    assert not slimformer.status(model)
    monkeypatch.setattr(preparation.Losses, "alone", _alone_of_none)
    plan = slimformer.optimize(model, tokenizer, max_loss=0.9, checkpoint=tmp_path, **QUICK)
    # The first candidate was not judged again, nor was any unit.
    assert [proposal.words for proposal in count].count(count[0].words) == 1
    assert [entry["what"] for entry in told(plan)["candidates"]] == [
        entry["what"] for entry in told(whole)["candidates"]
    ]
    assert plan.methods == whole.methods


def _alone_of_none(self: Any, units: Any, known: Any, advance: Any) -> Any:
    raise AssertionError("every unit had been judged")


def test_where_nothing_fits_the_plan_changes_nothing_and_says_what_the_nearest_costs(
    model: Any, tokenizer: Any
) -> None:
    plan = slimformer.optimize(model, tokenizer, max_loss=1e-6, **QUICK)
    assert plan.methods == (LayerDrop(),)
    found = told(plan)
    assert found["won"] is False
    assert "the nearest" in found["why"]
    assert "times dense and loses" in found["why"]
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        dense = model(ids).logits
        with patched(model, plan):
            torch.testing.assert_close(model(ids).logits, dense)


def test_the_least_loss_at_a_size_is_at_least_so_small(model: Any, tokenizer: Any) -> None:
    plan = slimformer.optimize(model, tokenizer, speedup=1.3, **QUICK)
    chosen = next(entry for entry in told(plan)["candidates"] if entry["chosen"])
    fitting = [entry for entry in told(plan)["candidates"] if entry["speedup"] >= 1.3]
    assert chosen["speedup"] >= 1.3
    assert len(fitting) > 1


def test_a_wish_beyond_what_can_go_says_how_far_it_goes(model: Any, tokenizer: Any) -> None:
    plan = slimformer.optimize(model, tokenizer, speedup=500.0, **QUICK)
    assert told(plan)["won"] is False
    assert "500.00 times as small" in told(plan)["why"]


def test_no_plan_slower_than_dense_is_returned(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Where nothing saves any time, each run of a plan takes longer than dense by what it adds.
    def slower(self: Any, methods: Any, allowance: float) -> tuple[float, float]:
        return 1.0, 1.02

    monkeypatch.setattr(preparation.Meter, "compared", slower)
    monkeypatch.setattr(preparation.Meter, "estimated", slower)
    plan = slimformer.optimize(
        model, tokenizer, goal="prefill", max_loss=0.9, data=TEXTS, prompt=32, minutes=3, repair=False
    )
    faster = [entry for entry in told(plan)["candidates"] if entry["speedup"] > 1]
    assert [entry["what"] for entry in faster] in ([], ["nothing dropped"])
    assert not any(entry["chosen"] for entry in told(plan)["candidates"])
    assert plan.methods == (LayerDrop(),)


def test_what_is_no_faster_than_the_patch_alone_is_not_chosen(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # While it is searched every plan looks faster than the patch alone, and in the end as fast.
    costs = Costs(2.0, 1.0, {})
    measured = preparation.Meter.costs

    def known(self: Any, units: Any, *rest: Any) -> Costs:
        found = measured(self, units, *rest)
        return Costs(costs.dense, costs.plain, dict.fromkeys(found.saved, 0.1))

    monkeypatch.setattr(preparation.Meter, "costs", known)
    monkeypatch.setattr(preparation.Meter, "estimated", lambda *asked: (2.0, 0.8))
    monkeypatch.setattr(preparation.Meter, "compared", lambda *asked: (2.0, 1.0))
    plan = slimformer.optimize(
        model, tokenizer, goal="prefill", max_loss=0.9, data=TEXTS, prompt=32, minutes=3, repair=False
    )
    assert plan.methods == (LayerDrop(),)
    assert "slimformer.patch(model) alone" in told(plan)["notes"][-1]


@pytest.mark.parametrize("goal", ["prefill", "generate"])
def test_times_are_measured_in_the_phase_asked_for(model: Any, tokenizer: Any, goal: Any) -> None:
    plan = slimformer.optimize(
        model,
        tokenizer,
        goal=goal,
        max_loss=0.9,
        data=TEXTS,
        prompt=24,
        new_tokens=3,
        minutes=3,
        repair=False,
    )
    found = told(plan)
    assert (found["unit"], found["new_tokens"]) == ("seconds", 3 if goal == "generate" else 0)
    assert all(entry["dense"] > 0 and entry["cost"] > 0 for entry in found["candidates"])
    assert plan.provenance["optimize"]["costs"]["dense"] > 0


def test_models_of_the_second_tier_drop_sublayers_and_say_so(tokenizer: Any) -> None:
    model = strong("bloom", n_head=4)
    assert slimformer.support(model).tier == "sublayers"
    plan = slimformer.optimize(
        model, tokenizer, goal="prefill", max_loss=0.9, data=TEXTS, prompt=32, minutes=3
    )
    assert "only whole sublayers can be dropped" in " ".join(told(plan)["notes"])
    assert all(isinstance(method, LayerDrop) for method in plan.methods)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"goal": "speed"}, "goal must be one of prefill, generate, encode, memory"),
        ({"goal": "encode"}, "predicts tokens"),
        ({"max_loss": 0.02, "speedup": 1.5}, "Give either max_loss or speedup, got both"),
        ({"max_loss": 2}, "0.02 for 2%"),
        ({"max_loss": "2%"}, "0.02 for 2%"),
        ({"speedup": 1.0}, "speedup must be above 1"),
        ({"minutes": 0}, "minutes must be a number above 0"),
        ({"prompt": 0}, "prompt must be at least 1"),
        ({"prompt": 4000}, "more than the 128 that the model reads"),
    ],
)
def test_a_wish_that_is_none_is_refused(model: Any, tokenizer: Any, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        slimformer.optimize(model, tokenizer, **{**QUICK, **wrong})


def test_text_shorter_than_the_prompt_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"A prompt has 120 tokens, and a Python list, 2 texts.* is shorter"):
        slimformer.optimize(
            model,
            tokenizer,
            **{**QUICK, "data": ["too short", "as is this"], "prompt": 120, "hold_out": False},
        )


def test_too_few_minutes_for_one_round_are_said_to_be(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"too few for one round.*is kept: the same call goes on"):
        slimformer.optimize(model, tokenizer, checkpoint=tmp_path, **{**QUICK, "minutes": 1e-5})


def test_a_device_that_fills_up_is_said_and_what_was_judged_is_kept(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = slimformer.optimize(model, tokenizer, max_loss=0.9, **QUICK)
    judged = Judge.judged
    count: list[Proposal] = []

    def full(self: Judge, proposal: Proposal) -> Candidate:
        count.append(proposal)
        if len(count) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return judged(self, proposal)

    monkeypatch.setattr(Judge, "judged", full)
    with pytest.raises(
        CalibrationError, match=r"full, with 1 prompts of up to 32 tokens.*smaller batch.*is kept in"
    ):
        slimformer.optimize(model, tokenizer, max_loss=0.9, checkpoint=tmp_path, **QUICK)
    assert not slimformer.status(model)
    plan = slimformer.optimize(model, tokenizer, max_loss=0.9, checkpoint=tmp_path, **QUICK)
    assert len(count) == 1 + ROUNDS
    assert plan.methods == whole.methods


def test_after_an_interruption_the_same_rows_are_judged_by_however_fast_the_machine_is_then(
    model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = slimformer.optimize(model, tokenizer, max_loss=0.9, **QUICK)
    with monkeypatch.context() as slowly:
        slowly.setattr(losses_module, "_PATIENCE", 1e-9)
        slow = slimformer.optimize(model, tokenizer, max_loss=0.9, checkpoint=tmp_path, **QUICK)
    assert slow.provenance["tokens"] < whole.provenance["tokens"]
    again = slimformer.optimize(model, tokenizer, max_loss=0.9, checkpoint=tmp_path, **QUICK)
    assert again.provenance["tokens"] == slow.provenance["tokens"]


def test_a_patched_model_is_refused(model: Any, tokenizer: Any) -> None:
    with patched(model, LayerDrop(mlp=[1])), pytest.raises(CalibrationError, match="Call unpatch first"):
        slimformer.optimize(model, tokenizer, **QUICK)


def test_the_worst_capability_may_lose_twice_as_much() -> None:
    wish = Wish(0.02, None)
    assert one(0.5, 0.01, worst=0.03).fits(wish)
    assert not one(0.5, 0.0, worst=0.041).fits(wish)
    assert not one(1.0, 0.0).fits(wish)


def test_the_fastest_that_fits_comes_first_or_the_one_that_loses_least() -> None:
    candidates = [one(0.5, 0.1), one(0.8, 0.01), one(0.6, 0.02)]
    assert [found.cost for found in best(candidates, Wish(0.02, None))] == [0.6, 0.8]
    assert [found.cost for found in best(candidates, Wish(None, 1.5))] == [0.6, 0.5]
    assert nearest(candidates[:1], Wish(0.02, None)) == candidates[0]


def test_repaired_candidates_are_compared_with_repaired_ones() -> None:
    repaired = one(0.5, 0.01, repaired=True)
    plain = [one(0.6, 0.05), one(0.7, 0.06)]
    assert front([repaired, *plain]) == [repaired, plain[0]]

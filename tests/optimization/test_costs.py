"""What units cost: bytes are counted, like layers are timed together, and bases leave less to save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.optimization.conftest import strong

import slimformer
from slimformer import LayerDrop
from slimformer.evaluation.timing.speed import cache_bytes
from slimformer.examination.tiers import support
from slimformer.optimization.goals import Conditions, Prompts, weight_bytes
from slimformer.optimization.measuring.costs import Costs, Meter
from slimformer.optimization.units import Base, Proposal, allowed, drop_of, droppable


def meter(model: Any, goal: Any, prompt: int = 24, batch: int = 2) -> Meter:
    ids = torch.randint(3, 60, (batch, prompt), generator=torch.Generator().manual_seed(0))
    return Meter(model, support(model), Prompts(ids, 0), Conditions(goal, prompt, 0, batch))


def test_bytes_saved_are_those_of_the_weights_and_of_the_cache(model: Any) -> None:
    by = meter(model, "memory")
    units = droppable(model, by.support)
    costs = by.costs(units, 1.0)
    # Keys and values of 2 prompts of 24 tokens, 2 heads of 8, in float32.
    cached = 2 * 2 * 24 * 2 * 8 * 4
    assert costs.dense == weight_bytes(model) + 4 * cached
    layer = model.model.layers[1]
    attention = sum(p.nbytes for p in (*layer.self_attn.parameters(), *layer.input_layernorm.parameters()))
    mlp = sum(p.nbytes for p in (*layer.mlp.parameters(), *layer.post_attention_layernorm.parameters()))
    assert costs.saved["attention", 1] == attention + cached
    assert costs.saved["mlp", 1] == mlp


def test_the_bytes_of_a_plan_are_those_of_its_parts(model: Any) -> None:
    by = meter(model, "memory")
    units = [("attention", 1), ("mlp", 1), ("mlp", 3)]
    costs = by.costs(units, 1.0)
    dense, slim = by.compared((drop_of(units),), 1.0)
    assert slim == costs.of(Base("", (), costs.plain), units)
    assert dense == costs.dense
    with slimformer.patched(model, drop_of(units)):
        held = cache_bytes(by.workload.read(model))
    assert held == 3 * 2 * 2 * 24 * 2 * 8 * 4


def test_layers_of_one_shape_are_timed_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by = meter(model, "prefill")
    asked: list[Any] = []

    def in_turns(variants: Any, allowance: float) -> list[list[float]]:
        asked.extend(variants)
        return [[4.0, 4.0], [3.0, 3.0], [2.4, 2.4], [1.4, 1.4]]

    monkeypatch.setattr(by, "in_turns", in_turns)
    costs = by.costs(droppable(model, by.support), 1.0)
    # The dense model, the patched one, and one without all attentions but the first, or all MLPs.
    assert asked == [(), (LayerDrop(),), (LayerDrop(attention=[1, 2, 3]),), (LayerDrop(mlp=[0, 1, 2, 3]),)]
    assert (costs.dense, costs.plain) == (4.0, 3.0)
    assert [costs.saved["attention", layer] for layer in range(4)] == pytest.approx([0.2] * 4)
    assert [costs.saved["mlp", layer] for layer in range(4)] == pytest.approx([0.4] * 4)


def test_a_layer_of_another_shape_is_timed_by_itself(model: Any) -> None:
    assert Costs.from_dict(Costs(2.0, 1.5, {("mlp", 3): 0.5}).to_dict()) == Costs(2.0, 1.5, {("mlp", 3): 0.5})
    by = meter(strong("gemma3_text", num_hidden_layers=4), "prefill")
    shapes = {by._shape(layer) for layer in range(4)}
    assert len(shapes) == len(set(by.support.anatomy.layer_types))


def test_a_base_leaves_less_to_save_of_what_it_touches(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    by = meter(model, "prefill")
    units = [("mlp", layer) for layer in range(4)]
    costs = Costs(10.0, 9.0, dict.fromkeys(units, 2.0))
    # On a machine that has become half as slow, the base takes 6 of what would be 10.
    monkeypatch.setattr(by, "estimated", lambda methods, allowance: (20.0, 12.0))
    base = by.base(costs, "half of the tokens", (), units[2:], 1.0)
    assert base.cost == 6.0
    # Of 4 that the touched units cost, 3 are gone.
    assert base.left == {unit: pytest.approx(0.25) for unit in units[2:]}
    assert costs.of(base, [units[0], units[2]]) == pytest.approx(6.0 - 2.0 - 0.5)


def test_times_are_taken_in_turns_and_leave_the_model_as_it_was(model: Any) -> None:
    by = meter(model, "prefill")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    times = by.in_turns([(), (LayerDrop(mlp=[1]),)], allowance=0.0)
    assert [len(of) for of in times] == [2, 2]
    assert all(value > 0 for of in times for value in of)
    assert not slimformer.status(model)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


def test_the_last_attention_by_which_positions_are_counted_stays(model: Any) -> None:
    found = support(model)
    attentions = [("attention", layer) for layer in range(4)]
    assert not allowed(found, attentions)
    assert allowed(found, attentions[1:])


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ((), "nothing dropped"),
        ((("attention", 2), ("mlp", 2)), "blocks 2"),
        ((("attention", 1), ("mlp", 2)), "attentions 1, MLPs 2"),
    ],
)
def test_a_proposal_says_what_it_leaves_out(units: Any, expected: str) -> None:
    assert Proposal("", units).words == expected

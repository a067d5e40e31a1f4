"""ARank orders layers by what their attention maps say, and routers learn beside the frozen model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_training import TEXTS
from torch import Tensor

import slimformer
from slimformer import MixtureOfDepths, Plan
from slimformer.errors import CalibrationError, PlanError
from slimformer.model.anatomy import find_anatomy
from slimformer.patching import keep_ratios
from slimformer.training.loop import TrainingSettings
from slimformer.training.routing.arank import attention_ranks, calibrate_arank, layer_ranks, lowest
from slimformer.training.routing.routed_model import Routed
from slimformer.training.routing.routers import learn_routers
from slow_rows import small
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model


def maps(model: Any, ids: Tensor) -> list[Tensor]:
    """The attention weights of every layer by the model's own eager attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        return list(model(ids, output_attentions=True).attentions)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bert"])
@pytest.mark.parametrize("metric", ["effective_rank", "rank"])
def test_ranks_of_all_rows_are_those_of_the_maps(name: str, metric: Any) -> None:
    model, ids = tiny_model(name), torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        got = layer_ranks(find_anatomy(model), [ids[:1], ids[1:]], metric=metric, queries=None)
    for weights, rank in zip(maps(model, ids), got, strict=True):
        expected = []
        for matrix in weights.flatten(0, 1):
            sigma = torch.linalg.svdvals((matrix - matrix.diag().diag()).double())
            part = sigma / sigma.sum()
            entropy = -(part * part.clamp_min(1e-300).log()).sum()
            least = 40 * torch.finfo(torch.float32).eps * sigma[0]
            expected.append(
                float(entropy.exp()) if metric == "effective_rank" else float((sigma > least).sum())
            )
        assert rank == pytest.approx(
            sum(expected) / len(expected), rel=2e-3 if metric == "effective_rank" else 0.06
        )


def test_a_map_of_equal_rows_has_rank_one_and_another_more() -> None:
    queries = torch.arange(10, 14)
    flat = torch.zeros(1, 1, 4, 20)
    flat[..., 0] = 1.0
    assert float(attention_ranks(flat, queries, "effective_rank")) == pytest.approx(1.0)
    apart = torch.eye(20)[None, None, :4]
    assert float(attention_ranks(apart, queries, "effective_rank")) == pytest.approx(4.0)


def test_the_first_three_and_the_last_layer_are_left_alone() -> None:
    assert lowest([0, 0, 0, 5, 4, 3, 2, 0], 3) == [4, 5, 6]


def test_arank_makes_a_plan_that_changes_nothing_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    options: dict[str, Any] = {"data": TEXTS, "length": 64, "texts": 4, "kinds": ["attention", "mlp"]}
    plan = calibrate_arank(model, tiny_tokenizer(), number=2, checkpoint=tmp_path, **options)
    again = calibrate_arank(model, tiny_tokenizer(), number=3, checkpoint=tmp_path, **options)
    assert plan.provenance["arank"] == again.provenance["arank"]
    method = plan.methods[0]
    assert isinstance(method, MixtureOfDepths)
    assert method.attention == method.mlp == tuple(lowest(plan.provenance["arank"], 2))
    ids = torch.randint(3, 64, (2, 30))
    with torch.no_grad():
        dense = model(ids).logits
        torch.testing.assert_close(slimformer.patch(model, plan)(ids).logits, dense, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layers_that_change_nothing_cost_nothing_to_skip(name: str) -> None:
    model = tiny_model(name, num_hidden_layers=8, initializer_range=0.3)
    nothing = [4, 6]
    for index in nothing:
        layer = find_anatomy(model).layers[index]
        output = layer.attention.output.dense if name == "bert" else layer.self_attn.o_proj
        with torch.no_grad():
            output.weight.zero_()
    plan = calibrate_arank(
        model, tiny_tokenizer(), number=2, metric="skip_cost", data=TEXTS, length=64, texts=4
    )
    assert all(parameter.requires_grad for parameter in model.parameters())
    costs = plan.provenance["arank"]
    if name == "llama":
        assert [costs[index] for index in nothing] == [0.0, 0.0]
        assert plan.methods[0].attention == tuple(nothing)  # type: ignore[attr-defined]
    assert sum(cost > 0 for cost in costs) >= 6


def test_arank_refuses_what_cannot_be() -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    with pytest.raises(CalibrationError, match="number must be from 1 to 4"):
        calibrate_arank(model, tiny_tokenizer(), number=5, data=TEXTS)
    with pytest.raises(PlanError, match=r"keep=.*got 0"):
        calibrate_arank(model, tiny_tokenizer(), keep=0, data=TEXTS)
    with pytest.raises(CalibrationError, match="one of effective_rank, rank, skip_cost"):
        calibrate_arank(model, tiny_tokenizer(), metric="best", data=TEXTS)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="never routed"):
        calibrate_arank(tiny_model("llama"), tiny_tokenizer(), data=TEXTS)


@pytest.mark.parametrize("shared", ["sublayer", "layer", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert"])
def test_routers_meet_their_budget_and_the_model_stays_as_it_was(name: str, shared: Any) -> None:
    model = tiny_model(name)
    before = copy.deepcopy(model.state_dict())
    method = MixtureOfDepths.keeping_everything(32, attention=[1, 2], mlp=[1, 3], keep=0.6, shared=shared)
    plan = learn_routers(
        model,
        tiny_tokenizer(),
        method,
        data=TEXTS,
        length=64,
        settings=TrainingSettings(steps=30, rows=2, learning_rate=1e-2),
    )
    found = plan.measured["routers"]
    assert found["keep"] == pytest.approx(0.6, abs=0.05)
    assert set(found["keep_of"]) == {"attention 1", "attention 2", "mlp 1", "mlp 3"}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    # The plan routes as the training did.
    ids = torch.randint(3, 60, (2, 64))
    with torch.no_grad():
        dense = model(ids)[0]
        slimformer.patch(model, plan)
        assert not torch.allclose(model(ids)[0], dense)
        assert torch.equal(slimformer.unpatch(model)(ids)[0], dense)


@pytest.mark.parametrize("fields", [{"routing": "top_k"}, {"per": "sequence"}])
def test_what_looks_at_whole_texts_is_trained_so(fields: dict[str, Any]) -> None:
    model = tiny_model("bert")
    method = MixtureOfDepths.keeping_everything(32, mlp=[1, 2, 3], keep=0.5, **fields)
    settings = TrainingSettings(steps=20, rows=4, learning_rate=1e-2)
    plan = learn_routers(model, tiny_tokenizer(), method, data=TEXTS, length=32, settings=settings)
    found = plan.measured["routers"]
    assert found["keep"] == pytest.approx(0.5, abs=0.2 if "per" in fields else 0.01)
    ids = torch.randint(3, 60, (4, 32))
    slimformer.patch(model, plan)
    with torch.no_grad():
        model(ids)
    for ratio in keep_ratios(model).values():
        assert ratio == 0.5 if "routing" in fields else ratio * 4 in range(5)


def test_training_beats_chance() -> None:
    model = small("llama")
    method = MixtureOfDepths.keeping_everything(32, mlp=[1, 2, 3], keep=0.5)
    short, long = (
        learn_routers(
            model,
            tiny_tokenizer(),
            method,
            data=TEXTS,
            length=64,
            settings=TrainingSettings(steps=steps, rows=4, learning_rate=rate),
        )
        for steps, rate in ((1, 1e-6), (150, 2e-2))
    )
    assert long.measured["routers"]["divergence"] < short.measured["routers"]["divergence"]


def test_an_interrupted_training_of_routers_goes_on_where_it_was(tmp_path: Path) -> None:
    model = tiny_model("llama")
    method = MixtureOfDepths.keeping_everything(32, mlp=[1, 2], keep=0.5)
    given: dict[str, Any] = {"method": method, "data": TEXTS, "length": 48}
    settings = TrainingSettings(steps=8, keep_every=3)
    first = learn_routers(model, tiny_tokenizer(), settings=settings, checkpoint=tmp_path, **given)
    # The checkpoint of step 6 is what is left; two steps are trained again.
    again = learn_routers(model, tiny_tokenizer(), settings=settings, checkpoint=tmp_path, **given)
    assert again.provenance["losses"] == first.provenance["losses"]
    for name, tensor in first.methods[0].tensors().items():
        assert torch.equal(again.methods[0].tensors()[name], tensor)
    first.save_pretrained(tmp_path / "plan")
    assert Plan.from_pretrained(tmp_path / "plan").methods == first.methods


def test_routers_refuse_what_does_not_fit() -> None:
    model, method = tiny_model("llama"), MixtureOfDepths.keeping_everything(48, mlp=[1])
    with pytest.raises(PlanError, match="hidden size of 48"):
        learn_routers(model, tiny_tokenizer(), method, data=TEXTS)
    fits = MixtureOfDepths.keeping_everything(32, mlp=[1])
    with slimformer.patched(model, fits), pytest.raises(CalibrationError, match="Call unpatch first"):
        learn_routers(model, tiny_tokenizer(), fits, data=TEXTS)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_costs_are_in_the_mean_what_closing_a_gate_a_little_costs(name: str) -> None:
    """Twice the divergence over the squared distance, summed over tokens; draws leave a few percent of noise."""
    model = small(name)
    method = MixtureOfDepths.keeping_everything(32, attention=[1], mlp=[2])
    routed = Routed(model, find_anatomy(model), method)
    given, by = routed.call({"input_ids": torch.randint(3, 64, (1, 12))}), 0.02
    torch.manual_seed(0)
    drawn = [[float(cost.sum()) for cost in routed.lesson(given).costs] for _ in range(400)]

    def closed(number: int | None, token: int) -> Tensor:
        def gate(at: int, h: Tensor) -> Tensor:
            gates = torch.ones(1, 12)
            if at == number:
                gates[0, token] -= by
            return gates

        return routed._gated(given.call, gate)

    with torch.no_grad():
        dense = closed(None, 0)
        for number in range(2):
            apart = [float(divergence(model, dense, closed(number, token))) for token in range(12)]
            assert torch.tensor(drawn)[:, number].mean() == pytest.approx(2 * sum(apart) / by**2, rel=0.2)


def divergence(model: Any, dense: Tensor, other: Tensor) -> Tensor:
    """KL of next tokens summed over the text, in an encoder one minus the cosine of hidden states."""
    if not find_anatomy(model).causal:
        return (1 - torch.cosine_similarity(dense.double(), other.double(), dim=-1)).sum()
    p, q = (model.lm_head(model.model.norm(h)).double().log_softmax(-1) for h in (dense, other))
    return (p.exp() * (p - q)).sum()


@pytest.mark.parametrize("shared", ["sublayer", "layer", "all"])
def test_fresh_routers_have_one_spread_whatever_shares_them(shared: Any) -> None:
    model = small("llama")
    method = MixtureOfDepths.keeping_everything(32, attention=[1, 2], mlp=[1, 2, 3], shared=shared)
    routed = Routed(model, find_anatomy(model), method)
    row = {"input_ids": torch.randint(3, 64, (1, 60))}
    routers = routed.fresh_routers(row)
    with torch.no_grad():
        scores = routed.run(routers, routed.call(row)).scores
    names = list(routed.names.values())
    for name in routers.place:
        mine = torch.stack([score for score, of in zip(scores, names, strict=True) if of == name])
        assert float(mine.std()) == pytest.approx(0.2, rel=0.2)

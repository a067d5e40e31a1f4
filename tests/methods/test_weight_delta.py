"""Changed weights: merged when patched, the model's own tensors back when unpatched, whatever happened in between."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.changes.ledger import Ledger
from slimformer.errors import PlanError
from slimformer.methods.weight_delta import WeightDelta
from slimformer.patching import switched_off
from tiny_models import tiny_model

GENERATOR = torch.Generator().manual_seed(2)
IDS = torch.randint(3, 64, (2, 20), generator=GENERATOR)
QUERY, NORM = "1.self_attn.q_proj.weight", "2.input_layernorm.weight"


def some_delta() -> WeightDelta:
    return WeightDelta(
        {
            f"{QUERY}.left": torch.randn(32, 2, generator=GENERATOR),
            f"{QUERY}.right": torch.randn(2, 32, generator=GENERATOR),
            f"{NORM}.added": torch.randn(32, generator=GENERATOR),
        }
    )


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def test_the_sum_is_computed_with_and_the_own_tensors_come_back() -> None:
    model, delta = tiny_model("llama"), some_delta()
    layer, dense = model.model.layers[1], logits(model)
    own = layer.self_attn.q_proj.weight
    slimformer.patch(model, delta)
    left, right = (delta.weights[f"{QUERY}.{end}"] for end in ("left", "right"))
    torch.testing.assert_close(layer.self_attn.q_proj.weight, own + left @ right)
    by_hand = tiny_model("llama")
    with torch.no_grad():
        by_hand.model.layers[1].self_attn.q_proj.weight += left @ right
        by_hand.model.layers[2].input_layernorm.weight += delta.weights[f"{NORM}.added"]
    torch.testing.assert_close(logits(model), logits(by_hand), atol=1e-5, rtol=1e-5)
    slimformer.unpatch(model)
    assert layer.self_attn.q_proj.weight is own
    assert torch.equal(logits(model), dense)


def test_switched_off_it_is_the_unpatched_model_also_after_an_exception() -> None:
    model, dense = tiny_model("llama"), logits(tiny_model("llama"))
    slim = logits(slimformer.patch(model, some_delta(), LayerDrop(attention=[0], mlp=[3])))
    state, buffers = list(model.state_dict()), [name for name, _ in model.named_buffers()]
    with switched_off(model):
        assert slimformer.status(model) == {}
        assert torch.equal(logits(model), dense)
    assert torch.equal(logits(model), slim)
    with pytest.raises(IndexError), switched_off(model):
        model(torch.full((1, 2), 9999))
    assert torch.equal(logits(model), slim)
    assert (list(model.state_dict()), [name for name, _ in model.named_buffers()]) == (state, buffers)
    assert torch.equal(logits(slimformer.unpatch(model)), dense)


def test_a_model_that_was_cast_while_patched_is_unpatched_in_its_new_dtype() -> None:
    expected = logits(tiny_model("llama").double())
    model = slimformer.patch(tiny_model("llama"), some_delta()).double()
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == torch.float64
    assert torch.equal(logits(slimformer.unpatch(model)), expected)


def test_copies_and_pickles_are_unpatched_on_their_own() -> None:
    model = slimformer.patch(tiny_model("llama"), some_delta())
    slim, dense = logits(model), logits(tiny_model("llama"))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), slim)
        assert torch.equal(other.state_dict()["model.layers.1.self_attn.q_proj.weight"], _own_query())
        assert torch.equal(logits(slimformer.unpatch(other)), dense)
        assert torch.equal(logits(model), slim)


def _own_query() -> Tensor:
    return tiny_model("llama").model.layers[1].self_attn.q_proj.weight.detach()


def test_a_saved_model_has_its_own_weights_and_the_plan_beside_them(tmp_path: Path) -> None:
    model = slimformer.patch(tiny_model("llama"), Plan([some_delta()]))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[1].self_attn.q_proj.weight, _own_query())
    assert torch.equal(logits(slimformer.patch(loaded, "auto")), logits(model))


def test_changes_of_the_same_weight_add_up_and_count_beside_drops() -> None:
    model, first, second = tiny_model("llama"), some_delta(), some_delta()
    together = logits(slimformer.patch(model, first, second, LayerDrop(attention=[2])))
    one = logits(slimformer.patch(model, first.followed_by(second), LayerDrop(attention=[2])))
    torch.testing.assert_close(together, one, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(slimformer.unpatch(model)), logits(tiny_model("llama")))


def other_model() -> PreTrainedModel:
    """The same architecture with other weights."""
    model = tiny_model("llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.1)
    return model


@pytest.mark.parametrize("assign", [False, True])
def test_its_own_state_loaded_again_changes_nothing(assign: bool) -> None:
    model = slimformer.patch(tiny_model("llama"), some_delta())
    slim = logits(model)
    model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=assign)
    assert torch.equal(logits(model), slim)
    assert torch.equal(logits(slimformer.unpatch(model)), logits(tiny_model("llama")))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_is_loaded_gets_the_change_on_top_and_stays(assign: bool) -> None:
    model, delta = tiny_model("llama"), some_delta()
    slimformer.patch(model, delta)
    model.load_state_dict(other_model().state_dict(), assign=assign)
    assert torch.equal(logits(model), logits(slimformer.patch(other_model(), delta)))
    assert torch.equal(
        model.state_dict()[f"model.layers.{QUERY}"], other_model().state_dict()[f"model.layers.{QUERY}"]
    )
    assert torch.equal(logits(slimformer.unpatch(model)), logits(other_model()))


def test_a_state_of_another_shape_is_refused_and_changes_nothing() -> None:
    model = slimformer.patch(tiny_model("llama"), some_delta())
    slim, state = logits(model), model.state_dict()
    state[f"model.layers.{QUERY}"] = torch.zeros(3, 3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)
    assert torch.equal(logits(model), slim)
    assert torch.equal(logits(slimformer.unpatch(model)), logits(tiny_model("llama")))


def test_a_state_loaded_while_switched_off_or_under_another_patch_gets_the_change_too() -> None:
    delta = some_delta()
    expected = logits(slimformer.patch(other_model(), delta))
    for block in (switched_off, lambda model: slimformer.patched(model, LayerDrop(attention=[1]))):
        model = slimformer.patch(tiny_model("llama"), delta)
        with block(model):
            model.load_state_dict(other_model().state_dict())
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(slimformer.unpatch(model)), logits(other_model()))


def test_a_cast_model_computes_with_the_sum_of_its_cast_weights_and_is_copied() -> None:
    delta = some_delta()
    model = slimformer.patch(tiny_model("llama"), delta).to(torch.bfloat16)
    slim = logits(model)
    assert torch.equal(slim, logits(slimformer.patch(tiny_model("llama").to(torch.bfloat16), delta)))
    twin = copy.deepcopy(model)
    dense = logits(tiny_model("llama").to(torch.bfloat16))
    assert torch.equal(logits(twin), slim)
    assert torch.equal(logits(slimformer.unpatch(twin)), dense)
    assert torch.equal(logits(model), slim)
    twin = slimformer.patch(copy.deepcopy(model), LayerDrop(attention=[1]))
    assert torch.equal(logits(slimformer.unpatch(twin)), dense)


def test_training_while_patched_trains_the_own_weights() -> None:
    model, delta = tiny_model("llama"), some_delta()
    slimformer.patch(model, delta)
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    slim, state = logits(model), model.state_dict()
    assert not torch.equal(state[f"model.layers.{QUERY}"], _own_query())
    again = tiny_model("llama")
    again.load_state_dict(state)
    torch.testing.assert_close(logits(slimformer.unpatch(model)), logits(again))
    torch.testing.assert_close(logits(slimformer.patch(again, delta)), slim, atol=1e-5, rtol=1e-5)


def test_adapters_merged_into_a_changed_weight_come_out_of_the_own_one() -> None:
    peft = pytest.importorskip("peft")
    model = slimformer.patch(tiny_model("llama"), some_delta())
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    slim = logits(adapted)
    adapted.merge_adapter()
    torch.testing.assert_close(logits(adapted), slim, atol=1e-5, rtol=1e-5)
    slimformer.unpatch(adapted)
    adapted.unmerge_adapter()
    with adapted.disable_adapter():
        torch.testing.assert_close(logits(adapted), logits(tiny_model("llama")), atol=1e-5, rtol=1e-5)


def test_freezing_a_changed_weight_freezes_the_own_one() -> None:
    model = slimformer.patch(tiny_model("llama"), some_delta())
    model.requires_grad_(False)
    with switched_off(model):
        assert not any(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in slimformer.unpatch(model).parameters())


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({}, "changes no weight"),
        ({"1.mlp.weight": torch.zeros(2)}, r"takes names such as 3\.mlp\.up_proj\.weight\.left"),
        ({f"{QUERY}.left": torch.zeros(4, 2)}, "is damaged"),
        ({f"{QUERY}.left": torch.zeros(4, 2), f"{QUERY}.right": torch.zeros(3, 4)}, "is damaged"),
        ({f"{NORM}.added": torch.zeros(4), f"{NORM}.left": torch.zeros(4, 2)}, "is damaged"),
    ],
)
def test_damaged_changes_are_refused(weights: dict[str, Tensor], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        WeightDelta(weights)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("9.input_layernorm.weight", 32, "has 4 layers"),
        ("1.ln_1.weight", 32, "made for another model"),
        ("1.mlp.c_fc.bias", 32, "has no such parameter"),
        (NORM, 48, r"has the shape \(48,\), and the model's parameter \(32,\)"),
    ],
)
def test_changes_for_another_model_are_refused_and_leave_it_alone(name: str, shape: int, words: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(PlanError, match=words):
        slimformer.patch(model, WeightDelta({f"{name}.added": torch.zeros(shape)}))
    assert slimformer.status(model) == {}
    assert torch.equal(logits(model), logits(tiny_model("llama")))


def test_quantised_weights_are_not_added_to() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(PlanError, match="are quantised"):
        slimformer.patch(model, some_delta())


def test_a_ledger_makes_changes_again_in_their_order() -> None:
    layer, ledger = torch.nn.Linear(2, 2), Ledger()
    had = dict(vars(layer))
    ledger.set(layer, "note", 1)
    ledger.set(layer, "note", 2)
    ledger.add_buffer(layer, "extra", torch.ones(1))
    with ledger.switched_off():
        assert vars(layer).keys() == had.keys()
        assert "extra" not in dict(layer.named_buffers())
    assert (layer.note, list(dict(layer.named_buffers()))) == (2, ["extra"])
    ledger.undo()
    assert vars(layer).keys() == had.keys()

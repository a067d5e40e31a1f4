"""What a repair trains, and what teaches it: the same model without the patch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.training.test_repair import IDS, LONG, filters, repaired, strong
from torch import Tensor, nn

import slimformer
from slimformer import LayerDrop, Plan, TempScale, TokenElimination
from slimformer.methods.weight_delta import WeightDelta
from slimformer.model.anatomy import find_anatomy
from slimformer.training.distillation import Distillation
from slimformer.training.loop import TrainingSettings
from slimformer.training.trained_weights import TrainedWeights
from tiny_models import DECODERS, tiny_model


def test_tokens_leave_in_training_as_they_do_in_inference() -> None:
    model = strong("llama")
    plan = Plan([TokenElimination({2: 0.5}, window=8, least=32)])
    anatomy = find_anatomy(model)
    with slimformer.patched(model, plan):
        expected = anatomy.stack(IDS, use_cache=False).last_hidden_state
        with torch.no_grad():
            inferred = anatomy.stack(IDS, use_cache=False).last_hidden_state
        weights = TrainedWeights(anatomy, plan, ["norms"], None, 1)
        student = Distillation(model, plan, weights).student(weights.tensors(), IDS, None)
        student.output.sum().backward()
    assert not torch.allclose(expected, inferred)
    torch.testing.assert_close(student.output, inferred[:, -8:])
    assert all(bool(p.grad.abs().sum() > 0) for p in weights.parameters() if p.grad is not None)
    after = repaired(model, plan, LONG, length=128, near=None).measured["repair"]
    assert after["divergence_after"] <= after["divergence_before"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_teacher_is_the_unpatched_model_bit_for_bit(name: str) -> None:
    model = strong(name)
    anatomy = find_anatomy(model)
    plan = Plan([LayerDrop(attention=[1], mlp=[2]), WeightDelta(_some_delta(anatomy.layers[0]))])
    with torch.no_grad():
        dense = anatomy.stack(input_ids=IDS).last_hidden_state
    with slimformer.patched(model, plan):
        weights = TrainedWeights(anatomy, plan, ["norms", "lora"], None, 2)
        lesson = Distillation(model, plan, weights)
        for parameter in weights.parameters():
            nn.init.normal_(parameter)
        slim = lesson.student(weights.tensors(), IDS, None).output
        taught = lesson.teacher(IDS, None).output
        again = lesson.student(weights.tensors(), IDS, None).output
        weights.adapters.take_out()
    if name == "bert":
        dense = dense.mean(1)
        torch.testing.assert_close(taught, dense)
    else:
        assert torch.equal(taught, dense)
        assert not torch.allclose(slim, dense, atol=1e-2)
    assert torch.equal(slim, again)


def _some_delta(layer: nn.Module) -> dict[str, Tensor]:
    name = next(name for name, parameter in layer.named_parameters() if parameter.dim() == 1)
    return {f"0.{name}.added": torch.full_like(layer.get_parameter(name), 0.1)}


def test_what_is_trained_is_what_was_asked_for() -> None:
    model = strong("llama")
    plan = Plan([filters(("attention", 2))])
    added = repaired(model, plan, LONG, what=["added"])
    assert [type(method) for method in added.methods] == [LayerDrop]
    assert not torch.equal(
        added.methods[0].tensors()["attention.2.weight"], plan.methods[0].tensors()["attention.2.weight"]
    )
    norms, lora = (repaired(model, plan, LONG, what=[what], near=1).methods for what in ("norms", "lora"))
    assert all(
        torch.equal(norms[0].tensors()[name], tensor) for name, tensor in plan.methods[0].tensors().items()
    )
    # The norm in front of the filter is read by it, but the attention behind it does not run.
    assert set(norms[1].parameters) == {
        "1.input_layernorm.weight",
        "1.post_attention_layernorm.weight",
        "2.post_attention_layernorm.weight",
        "3.input_layernorm.weight",
        "3.post_attention_layernorm.weight",
    }
    assert {name.partition(".")[0] for name in lora[1].parameters} == {"1", "2", "3"}
    assert "2.self_attn.q_proj.weight" not in lora[1].parameters
    assert lora[1].tensors()["1.mlp.up_proj.weight.left"].shape == (48, 4)


@pytest.mark.parametrize(
    ("name", "methods"),
    [
        ("llama", [filters(("attention", 1), ("mlp", 2)), TempScale(tau=0.9)]),
        ("gpt2", [LayerDrop(attention=[1])]),
        ("bert", [LayerDrop(attention=[1])]),
    ],
)
def test_gradient_checkpointing_gives_the_same_repair(name: str, methods: list[Any]) -> None:
    model, few = strong(name), TrainingSettings(steps=6, rows=2, learning_rate=3e-3)
    plain, again = (
        repaired(model, Plan(methods), few, gradient_checkpointing=on, hidden=0.1).provenance["repair"][0]
        for on in (False, True)
    )
    assert again["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert again["held_out"] == pytest.approx(plain["held_out"], rel=1e-4)
    assert not any("forward" in vars(layer) for layer in find_anatomy(model).layers)


def test_what_is_trained_of_a_bfloat16_model_is_held_in_float32() -> None:
    model = strong("llama").bfloat16()
    plan = Plan([filters(("attention", 1), ("mlp", 2))])
    with slimformer.patched(model, plan):
        weights = TrainedWeights(find_anatomy(model), plan, ["added", "norms", "lora"], None, 2)
        assert {parameter.dtype for parameter in weights.parameters()} == {torch.float32}
        weights.adapters.take_out()


def test_every_decoder_structure_has_linear_layers_to_train() -> None:
    for name in DECODERS:
        model = tiny_model(name)
        anatomy = find_anatomy(model)
        plan = Plan([LayerDrop(attention=[1])])
        with slimformer.patched(model, plan):
            weights = TrainedWeights(anatomy, plan, ["lora"], None, 2)
            layers = {place.name.partition(".")[0] for place in weights.adapters.places}
            weights.adapters.take_out()
        # Mixtral's experts are no linear layers.
        assert layers == ({"0", "2", "3"} if name == "mixtral" else {"0", "1", "2", "3"})

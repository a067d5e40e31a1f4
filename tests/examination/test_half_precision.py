"""The plain patch keeps the output in half precision too, of models whose attention does more than its names say."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import slimformer
from slimformer.examination.layers import examine_layers
from slimformer.model.anatomy import find_anatomy
from slow_rows import arguments, outputs
from tiny_models import COMMON

# Sinks; neighbouring channels turned by angles in halves; neighbouring channels; layers without positions.
FAMILIES = {
    "gpt_oss": "sinks",
    "glm": "neighbours, angles in halves",
    "helium": "neighbours, angles in halves",
    "ernie4_5": "neighbours, angles in halves",
    "ernie4_5_moe": "neighbours, angles in halves",
    "cohere": "neighbours",
    "cohere2": "none",
    "smollm3": "none",
    "ministral3": "relative difference",
}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
# Of the tiny models' positions, 128.
FAR = 500


def sharp(name: str, **overrides: object) -> nn.Module:
    """A tiny model whose attention is far from uniform, so that a wrong one shows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**COMMON, "head_dim": 8, **EXPERTS, **overrides})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
            elif "embed" not in path:
                weight.mul_(8.0 if "q_proj" in path or "k_proj" in path else 4.0)
    return model


def off(model: nn.Module, given: dict[str, torch.Tensor], expected: torch.Tensor) -> float:
    real = given["attention_mask"].bool()
    return float((outputs(model, given).float() - expected)[real].norm() / expected[real].norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_batch_in_half_precision_is_as_close_to_float32_as_without_the_patch(
    name: str, dtype: torch.dtype
) -> None:
    model = sharp(name)
    given = arguments(name, [(5, 19), (0, 24), (21, 3)])
    given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    expected = outputs(model, given)
    half = copy.deepcopy(model).to(dtype)
    alone = off(half, given, expected)
    slimformer.patch(half)
    # Another order of the same roundings; a wrong attention is off by a tenth and more.
    assert off(half, given, expected) <= 1.3 * alone + 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_far_behind_the_trained_length_the_patch_changes_nothing(name: str) -> None:
    model = sharp(name)
    given = arguments(name, [(5, 19), (0, 24), (21, 3)])
    given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp_min(0) + FAR
    expected = outputs(model, given)
    slimformer.patch(model)
    assert off(model, given, expected) <= 1e-5


@pytest.mark.parametrize(("name", "found"), FAMILIES.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_an_attention_does_is_found_in_every_precision(
    name: str, found: str, dtype: torch.dtype
) -> None:
    findings = examine_layers(find_anatomy(sharp(name).to(dtype)))
    said = {f.attention.rotation if f.attention.projections else f.attention.reason for f in findings}
    assert any(found in words for words in said), said


def test_layers_of_one_class_that_are_configured_differently_are_examined_apart() -> None:
    findings = examine_layers(find_anatomy(sharp("smollm3")))
    assert [f.attention.rotation for f in findings] == ["halves", "halves", "halves", "none"]


def test_patching_again_examines_nothing_until_the_layers_change() -> None:
    model = sharp("glm")
    anatomy = find_anatomy(model)
    first = examine_layers(anatomy)
    assert examine_layers(anatomy) is first
    slimformer.unpatch(slimformer.patch(model))
    assert examine_layers(anatomy) is first
    anatomy.layers[2].self_attn.scaling *= 2
    again = examine_layers(anatomy)
    assert again is not first
    assert again[2].attention.projections is not None

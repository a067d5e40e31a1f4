"""Methods that turn queries and keys further turn the channels that the model turns, or refuse the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import slimformer
from slimformer import SelfExtend
from slimformer.errors import UnsupportedModelError
from slimformer.methods.rope_scaling import RopeScaling
from slow_rows import error, one_thread, outputs, positions  # noqa: F401
from slow_scores import slow_scores, slow_self_extend
from tiny_models import COMMON

TOKENS, TRAINED = 61, 23
METHOD = SelfExtend(4, 7, TRAINED)
NEIGHBOURS = {"glm": {"head_dim": 8}, "helium": {"head_dim": 8}, "ernie4_5": {"head_dim": 8}}
# A norm behind the rotation, and rotated channels behind others.
OTHERWISE: dict[str, dict[str, object]] = {
    "hunyuan_v1_dense": {"head_dim": 8},
    "deepseek_v3": {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1,
                    "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 4},
}  # fmt: skip


def sharp(name: str, **overrides: object) -> PreTrainedModel:
    """A model whose weights, those of norms too, all differ enough to count."""
    torch.manual_seed(0)
    own = {**NEIGHBOURS, **OTHERWISE}.get(name, {})
    config = AutoConfig.for_model(name, **{**COMMON, **own, **overrides})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.5 * noise if weight.dim() == 1 else noise * weight.shape[-1] ** -0.5)
    return model


def texts() -> dict[str, torch.Tensor]:
    """Two texts behind padding and one without."""
    ids = torch.randint(3, 64, (3, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :8] = mask[1, :41] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions(mask)}


def by_steps(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> tuple[torch.Tensor, DynamicCache]:
    """What the model gives chunk by chunk and token by token, and its cache."""
    past, found = DynamicCache(config=model.config), []
    for start, end in ((0, 17), (17, 18), (18, 45), (45, 46), (46, 47), (47, 61)):
        step = {
            "input_ids": given["input_ids"][:, start:end],
            "attention_mask": given["attention_mask"][:, :end],
            "position_ids": given["position_ids"][:, start:end],
        }
        found.append(outputs(model, step, past_key_values=past, use_cache=True))
    return torch.cat(found, 1), past


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_self_extend_turns_neighbouring_channels_where_the_model_does(name: str) -> None:
    model, given = sharp(name), texts()
    mask, dense = given["attention_mask"], outputs(model, given)
    score = slow_self_extend(model, mask, True, 4, 7, TRAINED, neighbours=True)
    with slow_scores(model, score):
        slow = outputs(model, given)
    slimformer.patch(model, METHOD)
    assert error(outputs(model, given), slow, mask) <= 1e-5
    assert error(by_steps(model, given)[0], slow, mask) <= 1e-5
    assert error(outputs(model, given), dense, mask) > 1e-2


@pytest.mark.parametrize("name", [*NEIGHBOURS, "llama", "qwen3"])
def test_rope_scaling_turns_cached_keys_as_the_model_would_have(name: str) -> None:
    model, given = sharp(name, **({"head_dim": 8} if name == "qwen3" else {})), texts()
    slimformer.patch(model, RopeScaling("linear", 3.0, trained_length=TRAINED))
    whole = DynamicCache(config=model.config)
    outputs(model, given, past_key_values=whole, use_cache=True)
    past = by_steps(model, given)[1]
    # The first layer's keys depend on nothing but their own token, so that both ways give the same.
    keys, expected = past.layers[0].keys, whole.layers[0].keys
    real = given["attention_mask"].bool()[:, None, :, None].expand_as(keys)
    assert torch.allclose(keys[real], expected[real], atol=1e-4)


@pytest.mark.parametrize("method", [METHOD, RopeScaling("linear", 3.0, trained_length=TRAINED)])
@pytest.mark.parametrize("name", OTHERWISE)
def test_what_is_turned_in_another_way_is_refused(name: str, method: Any) -> None:
    model, given = sharp(name), texts()
    dense, keys = outputs(model, given), set(vars(model))
    with pytest.raises(UnsupportedModelError, match="turned"):
        slimformer.patch(model, method)
    assert torch.equal(outputs(model, given), dense)
    assert set(vars(model)) == keys


def test_the_probe_holds_in_half_precision() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for name in ("glm", "llama"):
            slimformer.patch(sharp(name).to(dtype), METHOD)
        with pytest.raises(UnsupportedModelError, match="turned"):
            slimformer.patch(sharp("hunyuan_v1_dense").to(dtype), METHOD)

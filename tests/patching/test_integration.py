"""Patched models keep working with what people wrap around them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import slimformer
from slimformer import LayerDrop
from slimformer.model.anatomy import find_anatomy
from tiny_models import COMMON, tiny_model

DROP = LayerDrop(attention=[0], mlp=[1], block=[3])
IDS = torch.arange(3, 15)[None]


def vision_language(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    text = {**COMMON, "model_type": "llama"}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}  # fmt: skip
    if name == "llava":
        return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision)).eval()
    text = {
        **COMMON,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config=text, vision_config={"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32}
        )
    ).eval()


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_vision_language_models_are_patched_in_their_text_decoder(name: str) -> None:
    model = vision_language(name)
    assert len(find_anatomy(model).layers) == 4
    with torch.no_grad():
        dense = model(input_ids=IDS).logits
        with slimformer.patched(model, DROP):
            slim = model(input_ids=IDS, use_cache=False).logits
            first = model(input_ids=IDS[:, :8], use_cache=True)
            rest = model(input_ids=IDS[:, 8:], past_key_values=first.past_key_values, use_cache=True)
        assert torch.equal(model(input_ids=IDS).logits, dense)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1), slim, atol=1e-4, rtol=0)
    assert (slim - dense).abs().max() > 1e-4


def test_assisted_generation_gives_the_greedy_text() -> None:
    model = slimformer.patch(tiny_model("llama"), DROP)
    greedy = model.generate(IDS, do_sample=False, max_new_tokens=10)
    assisted = model.generate(IDS, do_sample=False, max_new_tokens=10, assistant_model=tiny_model("llama"))
    assert torch.equal(assisted, greedy)


def test_a_patched_model_saves_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        dense = model(IDS).logits
        slimformer.patch(model, DROP).save_pretrained(tmp_path)
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, dense)


def test_lora_on_a_patched_model_trains_and_changes_the_output() -> None:
    model = slimformer.patch(tiny_model("llama"), DROP)
    with torch.no_grad():
        before = model(IDS).logits
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert any("layers.1.self_attn" in n for n in trained)
    assert not any("layers.0.self_attn" in n for n in trained)
    with torch.no_grad():
        assert not torch.allclose(adapted(input_ids=IDS).logits, before)


def test_offloaded_models_keep_their_hooks() -> None:
    model = tiny_model("llama")
    with slimformer.patched(model, DROP), torch.no_grad():
        expected = model(IDS).logits
    with torch.no_grad():
        dense = model(IDS).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        with slimformer.patched(model, DROP):
            torch.testing.assert_close(model(IDS).logits, expected)
        torch.testing.assert_close(model(IDS).logits, dense)

"""Stacks that do something to the residual between their layers get all tokens of the batch from each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.llama import modeling_llama

import slimformer
from slimformer import TokenElimination
from slimformer.methods.elimination.random_keep import RandomKeep
from slimformer.model.anatomy import find_anatomy
from slow_rows import batch, error, kept, linears, one_thread, outputs, rows_through, slowly, small  # noqa: F401
from tiny_models import COMMON

CLOSE = 1e-5
IMAGE = 60


def qwen3_vl() -> Qwen3VLForConditionalGeneration:
    """A tiny random model whose images are four tokens, with features for two of its layers."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"depth": 3, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    config = Qwen3VLConfig(
        text_config={**COMMON, "head_dim": 8, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for weight in find_anatomy(model).layers.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5)
    return model.eval()


def questions() -> dict[str, Tensor]:
    """Two texts with an image each, of which one is padded in front."""
    ids = torch.randint(3, 50, (2, 18), generator=torch.Generator().manual_seed(1))
    ids[:, 8:14] = torch.tensor([62, IMAGE, IMAGE, IMAGE, IMAGE, 63])
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    ids[0, :5] = 0
    pixels = torch.randn(2 * 16, 3 * 2 * 2 * 2, generator=torch.Generator().manual_seed(2))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def test_features_that_a_stack_adds_by_position_reach_their_tokens() -> None:
    model, given = qwen3_vl(), questions()
    expected = outputs(model, given)
    features = {**given, "pixel_values": given["pixel_values"] * 0}
    assert error(outputs(model, features), expected, given["attention_mask"]) > 1e-2
    slimformer.patch(model)
    assert error(outputs(model, given), expected, given["attention_mask"]) <= CLOSE
    # Without an image nothing lies between the layers, and padding is not computed.
    words = {"input_ids": given["input_ids"].clamp_max(50), "attention_mask": given["attention_mask"]}
    with rows_through(*(layer.mlp.gate_proj for layer in find_anatomy(model).layers)) as rows:
        outputs(model, words)
    assert rows == [int(given["attention_mask"].sum())] * 4


def test_rows_are_chosen_beside_features_of_the_stack() -> None:
    model, given = qwen3_vl(), questions()
    method = RandomKeep(0.5, kinds=["mlp"], seed=3)
    places = (given["attention_mask"].cumsum(1) - 1).clamp_min(0)
    slimformer.patch(model, method)
    actual = outputs(model, {**given, "position_ids": places})
    slimformer.unpatch(model)
    with slowly(model, kept(method, places)):
        expected = outputs(model, {**given, "position_ids": places})
    assert error(actual, expected, given["attention_mask"]) <= CLOSE


class AddingModel(modeling_llama.LlamaModel):
    """A stack with an addition by position between its layers."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        """Adds something to every token of the batch behind every layer."""
        by_place = torch.linspace(-1, 1, input_ids.shape[1])[None, :, None]
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        rotary = self.rotary_emb(hidden, position_ids=positions)
        allowed = (
            attention_mask.bool()[:, None, None, :]
            & torch.ones(hidden.shape[1], hidden.shape[1]).bool().tril()
        )
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=allowed, position_embeddings=rotary)
            hidden = hidden + by_place
        return modeling_llama.BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


@pytest.mark.parametrize(
    "method", [(), (TokenElimination({2: 0.4}, scorer="random", least=8, window=3, sink=2),)]
)
def test_a_stack_that_adds_something_always_keeps_its_tokens(method: tuple[Any, ...]) -> None:
    model = small("llama").model
    model.__class__ = AddingModel
    model.config.use_cache = False
    given = {name: batch("llama", "left")[name] for name in ("input_ids", "attention_mask")}
    expected = outputs(model, given)
    slimformer.patch(model, *method)
    assert error(outputs(model, given), expected, given["attention_mask"]) <= CLOSE

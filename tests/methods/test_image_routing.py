"""Vision-language models: image tokens may pass sublayers by, and what is asked about them never does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.test_mixture_of_depths import Decisions, routed
from torch import Tensor, nn
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

import slimformer
from slimformer import MixtureOfDepths, Plan
from slimformer.errors import DataError, PlanError
from slimformer.model.anatomy import find_anatomy
from slimformer.patching import keep_ratios
from slimformer.training.loop import TrainingSettings
from slimformer.training.routing.arank import layer_ranks
from slimformer.training.routing.routers import learn_routers
from slow_rows import one_thread, rows_through, slowly  # noqa: F401
from tiny_models import COMMON, tiny_model

IMAGE, MODELS = 60, ["llava", "qwen2_vl"]
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 8, "patch_size": 2, "model_type": "clip_vision_model"}  # fmt: skip


def vision_language(name: str) -> PreTrainedModel:
    """A tiny random model whose images are 16 tokens."""
    torch.manual_seed(0)
    if name == "llava":
        text = {**COMMON, "model_type": "llama"}
        config: Any = LlavaConfig(text_config=text, vision_config=VISION, image_token_index=IMAGE)
        model: PreTrainedModel = LlavaForConditionalGeneration(config)
    else:
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
        vision = {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "patch_size": 2}
        config = Qwen2VLConfig(
            text_config={**COMMON, "rope_parameters": rope},
            vision_config=vision,
            image_token_id=IMAGE,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        )
        model = Qwen2VLForConditionalGeneration(config)
    with torch.no_grad():
        for weight in find_anatomy(model).layers.parameters():
            if weight.dim() > 1:
                weight.copy_(torch.randn(weight.shape) * weight.shape[-1] ** -0.5)
    return model.eval()


def question(name: str, seed: int) -> dict[str, Tensor]:
    """An image of 16 tokens between a few words and a question, as a processor makes it."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 60, (1, 14), generator=generator)
    ids = torch.cat([words[:, :4], torch.full((1, 16), IMAGE), words[:, 4:]], 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "llava":
        return {**given, "pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    # Two frames of 8 by 8 patches of 2 by 2 pixels in 3 colours; 4 patches are one token.
    patches = torch.randn(64, 3 * 2 * 2 * 2, generator=generator)
    types = (ids == IMAGE).int()
    return {
        **given,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": types,
    }


@pytest.mark.parametrize("routing", ["threshold", "top_k"])
@pytest.mark.parametrize("name", MODELS)
def test_only_image_tokens_are_skipped(name: str, routing: Any) -> None:
    model, given = vision_language(name), question(name, 1)
    method = routed(attention=[1], mlp=[1, 2], tokens="image", routing=routing)
    images = given["input_ids"] == IMAGE
    masks: dict[Any, Tensor] = {}
    with torch.no_grad():
        for kind, index in (("attention", 1), ("mlp", 1), ("mlp", 2)):
            decisions = Decisions(model, method)
            with slowly(model, masks):
                model(**given)
            decisions.close()
            keep = decisions.masks[index, kind]  # type: ignore[index]
            if routing == "top_k":
                score = decisions.scores[index, kind].masked_fill(~images, float("-inf"))  # type: ignore[index]
                keep = torch.zeros_like(images).scatter_(1, score.topk(8, dim=1).indices, True)
            masks[index, kind] = keep | ~images
        with slowly(model, masks):
            expected = model(**given).logits
        dense = model(**given).logits
        slimformer.patch(model, method)
        actual = model(**given).logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    assert (actual - dense).abs().max() > 1e-3
    ratios = keep_ratios(model)
    assert ratios == {(i, k): pytest.approx(float(m.float().mean())) for (i, k), m in masks.items()}


@pytest.mark.parametrize("routing", ["threshold", "top_k"])
@pytest.mark.parametrize("name", MODELS)
def test_generated_text_is_computed_whole(name: str, routing: Any) -> None:
    model, given = vision_language(name), question(name, 2)
    slimformer.patch(model, routed(attention=[1, 2], mlp=[1, 2], tokens="image", routing=routing))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    out = model.generate(**given, **options, return_dict_in_generate=True, output_logits=True)
    text = out.sequences[:, given["input_ids"].shape[1] :]
    longer = torch.cat([given["input_ids"], text], 1)
    whole = {**given, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    if "mm_token_type_ids" in given:
        whole["mm_token_type_ids"] = (longer == IMAGE).int()
    with torch.no_grad():
        logits = model(**whole, use_cache=False).logits[:, -5:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("routing", ["threshold", "top_k"])
@pytest.mark.parametrize("name", MODELS)
def test_routers_of_image_tokens_learn_from_images_with_text(name: str, routing: Any) -> None:
    model = vision_language(name)
    examples = [question(name, seed) for seed in range(6)]
    method = MixtureOfDepths.keeping_everything(
        32, attention=[1, 2], mlp=[1, 2], keep=0.5, tokens="image", routing=routing
    )
    settings = TrainingSettings(steps=10, rows=2, learning_rate=1e-2)
    plan = learn_routers(model, None, method, data=examples, settings=settings)
    found = plan.measured["routers"]
    assert found["keep"] == pytest.approx(0.5, abs=0.05)
    slimformer.patch(model, plan)
    given, images = examples[0], int((examples[0]["input_ids"] == IMAGE).sum())
    tokens = given["input_ids"].shape[1]
    layers = find_anatomy(model).layers
    gates = [layers[index].get_submodule("mlp.gate_proj") for index in (1, 2)]
    with torch.no_grad(), rows_through(*gates) as counts:
        model(**given)
    assert 0 < 2 * tokens - sum(counts) <= 2 * images
    # The same words without an image.
    words = given["input_ids"][given["input_ids"] != IMAGE][None]
    with torch.no_grad(), rows_through(*gates) as counts:
        model(input_ids=words)
    assert counts == [words.shape[1]] * 2


def test_arank_reads_images_with_text() -> None:
    model = vision_language("llava")
    anatomy = find_anatomy(model)
    examples = [question("llava", seed) for seed in range(2)]
    with torch.no_grad():
        got = layer_ranks(anatomy, examples, model=model, queries=None)
        others = [{**e, "pixel_values": -e["pixel_values"]} for e in examples]
        other = layer_ranks(anatomy, others, model=model, queries=None)
    assert len(got) == 4
    assert got != pytest.approx(other)


def test_what_has_no_images_is_refused() -> None:
    method = routed(mlp=[1], tokens="image")
    with pytest.raises(PlanError, match="names no image or video token"):
        slimformer.patch(tiny_model("llama"), method)
    model: nn.Module = slimformer.patch(vision_language("llava"), method)
    with pytest.raises(PlanError, match="without them"), torch.no_grad():
        model(inputs_embeds=torch.randn(1, 8, 32))
    slimformer.unpatch(model)
    with pytest.raises(DataError, match="images with text"):
        learn_routers(model, None, method, data=["only text"])
    words = {"input_ids": torch.arange(3, 20)[None]}
    with pytest.raises(DataError, match="no image token"):
        learn_routers(model, None, method, data=[words, words])
    with pytest.raises(PlanError, match="goes with routing='threshold' and tokens='all'"):
        routed(mlp=[1], tokens="image", per="sequence")


def test_plans_keep_what_is_routed(tmp_path: Any) -> None:
    Plan([routed(mlp=[1], tokens="image", routing="top_k")]).save_pretrained(tmp_path)
    method = Plan.from_pretrained(tmp_path).methods[0]
    assert isinstance(method, MixtureOfDepths)
    assert (method.tokens, method.routing, method.per) == ("image", "top_k", "token")

"""Continuous batching gives the tokens that `generate` gives, or the plan says that it cannot run there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.cache.test_cache_layouts import filters
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

import slimformer
from slimformer import LayerDrop, MixtureOfDepths, SelfExtend, TempScale, TokenElimination
from slimformer.errors import PlanError
from slimformer.methods.unpadding import Unpadding
from slow_rows import one_thread, small  # noqa: F401

PROMPTS = [[5, 9, 33, 12, 40, 7, 21, 30, 11], [8, 50, 3], [17, 4, 4, 61, 28, 19]]
NEW = 5


def routers(**fields: Any) -> MixtureOfDepths:
    """Routers under which about half of the tokens pass by."""
    generator = torch.Generator().manual_seed(4)
    weights: dict[str, torch.Tensor] = {}
    for name in ("attention.1", "mlp.1", "mlp.2"):
        weights[f"{name}.weight"] = torch.randn(32, generator=generator)
        weights[f"{name}.bias"] = torch.zeros(1)
    return MixtureOfDepths(attention=[1], mlp=[1, 2], weights=weights, **fields)


def continuously(model: PreTrainedModel) -> list[list[int]]:
    """What is generated for all prompts at once."""
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    results = model.generate_batch(PROMPTS, generation_config=config, continuous_batching_config=batching)
    assert [result.error for result in results.values()] == [None] * len(PROMPTS)
    return [list(result.generated_tokens) for result in results.values()]


def one_by_one(model: PreTrainedModel) -> list[list[int]]:
    """What is generated for each prompt alone."""
    options: dict[str, Any] = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in PROMPTS]


@pytest.mark.parametrize(
    "method",
    [
        Unpadding(),
        LayerDrop(attention=[0, 2]),
        LayerDrop(block=[1]),
        filters([1], taps=1),
        TempScale(tau=0.7),
        routers(),
    ],
    ids=["plain", "attentions", "block", "filter of one tap", "TempScale", "routers"],
)
def test_generates_what_generate_does(method: Any) -> None:
    model = slimformer.patch(small("llama"), method)
    assert continuously(model) == one_by_one(model)


@pytest.mark.parametrize(
    ("method", "why"),
    [
        (filters([1], taps=3), "filter of several taps"),
        (TokenElimination({2: 0.5}, sink=1, window=2, least=4), "whole text"),
        (routers(routing="top_k"), "whole text"),
        (SelfExtend(4, 7, 16), "how long a text is"),
    ],
    ids=["filter", "elimination", "top-k", "SelfExtend"],
)
def test_refuses_plans_that_need_whole_texts_before_anything_is_generated(method: Any, why: str) -> None:
    model = small("llama")
    dense = continuously(model)
    slimformer.patch(model, method)
    with pytest.raises(PlanError, match=why):
        continuously(model)
    slimformer.unpatch(model)
    assert continuously(model) == dense


@pytest.mark.parametrize("method", [
    TokenElimination({2: 0.5}, sink=1, window=2, least=4), routers(routing="top_k"),
])  # fmt: skip
def test_several_texts_in_one_row_are_refused_where_tokens_are_compared(method: Any) -> None:
    model = slimformer.patch(small("llama"), method)
    ids = torch.tensor([[*PROMPTS[0], *PROMPTS[1]]])
    ends = torch.tensor([0, 9, 12], dtype=torch.int32)
    with torch.no_grad(), pytest.raises(PlanError, match="several texts"):
        model(ids, use_cache=False, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=9, max_length_k=9)

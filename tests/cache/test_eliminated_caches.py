"""Caches of which tokens have left: static as dynamic ones, in chunks, cropped, and used again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.methods.test_token_elimination import NEW, RANDOM, TOKENS, ids, mask_of, positions
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import slimformer
from slimformer import TokenElimination
from slimformer.errors import PlanError
from tiny_models import tiny_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_static_cache_gives_what_a_dynamic_one_gives(name: str, attention: str) -> None:
    model, mask = slimformer.patch(tiny_model(name, attn_implementation=attention), RANDOM), mask_of(0, 5, 11)
    place, whole = positions(mask), torch.cat([mask, torch.ones(3, NEW, dtype=torch.long)], 1)
    caches = [DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=40)]
    logits: list[Tensor] = []
    with torch.no_grad():
        # A prompt in two chunks of which the second loses tokens too, then steps.
        for cache in caches:
            got = []
            for start, end in ((0, 13), (13, TOKENS), *((t, t + 1) for t in range(TOKENS, TOKENS + NEW))):
                at = place[:, start:end] if end <= TOKENS else place[:, -1:] + 1 + start - TOKENS
                out = model(
                    ids()[:, start:end],
                    attention_mask=whole[:, :end],
                    position_ids=at,
                    past_key_values=cache,
                    use_cache=True,
                )
                got.append(out.logits[:, -1])
            logits.append(torch.stack(got))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)


def test_generate_with_a_static_cache_is_generate_with_a_dynamic_one() -> None:
    model, mask = slimformer.patch(tiny_model("llama"), RANDOM), mask_of(0, 5, 11)
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(ids()[:, :TOKENS], attention_mask=mask, **options)
    for _ in range(2):
        static = model.generate(
            ids()[:, :TOKENS], attention_mask=mask, cache_implementation="static", **options
        )
        assert torch.equal(static, dynamic)


def steps_in(model: nn.Module, cache: Any, text: Tensor, mask: Tensor, ends: list[int]) -> list[Tensor]:
    """Logits of every chunk of a padded batch that ends at these tokens."""
    place, got, start = positions(mask), [], 0
    for end in ends:
        out = model(
            text[:, start:end],
            attention_mask=mask[:, :end],
            position_ids=place[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        got.append(out.logits)
        start = end
    return got


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("ends", [[30, 40], [5, 40], [20, 34, 40]])
def test_padding_stays_padding_in_every_later_chunk(static: bool, ends: list[int]) -> None:
    model, text = slimformer.patch(tiny_model("llama"), RANDOM), ids(2, 40)
    for row in ([1] * 40, [0] * 34 + [1] * 6), ([1] * 40, [0] * 3 + [1] * 27 + [0] * 4 + [1] * 6):
        mask, last = torch.tensor(row), []
        for other in (text, torch.where(mask.bool(), text, 66 - text)):
            cache = (
                StaticCache(config=model.config, max_cache_len=48)
                if static
                else DynamicCache(config=model.config)
            )
            with torch.no_grad():
                last.append(steps_in(model, cache, other, mask, ends)[-1][:, -1])
        assert last[0].isfinite().all()
        torch.testing.assert_close(last[0], last[1], atol=1e-6, rtol=0)


def test_tokens_are_taken_back_only_where_none_before_them_has_left() -> None:
    model, text = tiny_model("llama"), ids(1, 40)
    with (
        torch.no_grad(),
        slimformer.patched(model, TokenElimination({2: 0.4}, scorer="random", least=8, window=6)),
    ):
        cache = model(text[:, :30], use_cache=True).past_key_values
        model(text[:, 30:33], past_key_values=cache, use_cache=True)
        cache.crop(-5)
        kept = [layer.get_seq_length() for layer in cache.layers]
        again = model(text[:, 28:29], past_key_values=cache, use_cache=True).logits
        whole = model(text[:, :30], use_cache=True).past_key_values
        whole.crop(-2)
        expected = model(text[:, 28:29], past_key_values=whole, use_cache=True).logits
        torch.testing.assert_close(again, expected, atol=1e-6, rtol=0)
        with pytest.raises(PlanError, match="Cannot remove the last 20 tokens"):
            cache.crop(-20)
    assert kept == [28, 28, 10, 10]


def test_a_static_cache_serves_again_after_a_reset() -> None:
    model, text = slimformer.patch(tiny_model("llama"), RANDOM), ids(2, TOKENS)
    cache = StaticCache(config=model.config, max_cache_len=40)
    with torch.no_grad():
        first = model(text, past_key_values=cache, use_cache=True).logits
        cache.reset()
        assert torch.equal(model(text, past_key_values=cache, use_cache=True).logits, first)

"""CPU time of a tiny model's forward, dense and patched: what the executor itself costs. `pytest benchmarks/micro`."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import slimformer
from slimformer import LayerDrop

DROPS = {
    "dense": None,
    "half of the attentions": LayerDrop(attention=[1, 3, 5, 7]),
    "half of the MLPs": LayerDrop(mlp=[1, 3, 5, 7]),
    "half of the blocks": LayerDrop(block=[1, 3, 5, 7]),
}


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Eight layers so small that Python takes as long as arithmetic."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("dropped", DROPS)
@pytest.mark.parametrize("tokens", [1, 256])
def test_forward(benchmark: BenchmarkFixture, model: LlamaForCausalLM, tokens: int, dropped: str) -> None:
    """One forward; the time should fall with what is dropped."""
    benchmark.group = f"forward of {tokens} tokens"
    drop = DROPS[dropped]
    if drop is not None:
        slimformer.patch(model, drop)
    ids = torch.randint(256, (1, tokens))

    def forward() -> None:
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True)

    with torch.no_grad():
        benchmark(forward)


def test_patch_and_unpatch(benchmark: BenchmarkFixture, model: LlamaForCausalLM) -> None:
    """Patching includes a check of the structure on eight tokens."""
    benchmark.group = "patch"
    drop = LayerDrop(attention=[1, 3, 5, 7])
    benchmark(lambda: slimformer.unpatch(slimformer.patch(model, drop)))

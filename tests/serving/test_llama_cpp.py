"""llama.cpp computes from an exported GGUF file what the patched model does, and cuts texts as its tokenizer.

`make test-serving` runs these in an environment of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import slimformer
from serving.checkpoints import PLANS, PROMPTS, spread_checkpoint
from slimformer import EarlyExit, LayerDrop
from tiny_checkpoints import BPE, bpe_checkpoint

pytest.importorskip("xllamacpp")
from serving.llama_cpp import LlamaCpp

TOKENS = 8
TEXTS = ("int", "a string's 12345 x", "Return\n\n  the  values, as in  x=3;\t\tend \n", "über naïve 漢字 🙂 don't I'LL",
         "  leading", "...!?!", "<bos>twice", "")  # fmt: skip


def compare(file: Path, model: Any, prompts: list[list[int]], likely: int, near: float = 1e-3) -> None:
    """Greedy tokens are those of the model, and so are log-probabilities of the most likely."""
    engine = LlamaCpp(file)
    for ids in prompts:
        tokens, steps = engine.generate(ids, TOKENS, likely)
        assert tokens
        with torch.no_grad():
            expected = model(torch.tensor([ids + tokens])).logits.log_softmax(-1)[0, len(ids) - 1 : -1]
        assert tokens == expected.argmax(-1).tolist()
        # A token that is a part of a character is not told by itself.
        if len(steps) == len(tokens):
            for step, row in zip(steps, expected, strict=True):
                told = torch.tensor(list(step.values()))
                torch.testing.assert_close(told, row[list(step)], atol=near, rtol=near)


@pytest.mark.parametrize("name", PLANS)
def test_tokens_and_log_probabilities_of_smollm2_are_those_of_the_patched_model(
    name: str, smollm2: Path, tmp_path: Path
) -> None:
    done = slimformer.export(smollm2, PLANS[name], tmp_path / "slim", to="gguf", dtype="f32")
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    slimformer.patch(model, *PLANS[name])
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    compare(done.folder / "model.gguf", model, prompts, 5)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LAYERS = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
WINDOWS = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4}
BLOCKS, PARTS = [LayerDrop(block=[1])], [LayerDrop(attention=[0, 2], mlp=[1])]


@pytest.mark.parametrize(
    ("name", "plan", "overrides"),
    [
        ("llama", BLOCKS, {}),
        ("llama", BLOCKS, {"rope_parameters": LLAMA3}),
        ("llama", BLOCKS, {"rope_parameters": LINEAR, "attention_bias": True, "tie_word_embeddings": True}),
        ("llama", PARTS, {"rope_parameters": LLAMA3}),
        ("mistral", BLOCKS, {"head_dim": 16}),
        ("mistral", PARTS, {"head_dim": 16}),
        ("qwen2", BLOCKS, {}),
        ("qwen2", PARTS, {}),
        ("qwen3", BLOCKS, {}),
        ("olmo2", BLOCKS, {}),
        ("smollm3", [EarlyExit(layer=4)], {"num_hidden_layers": 6, "pad_token_id": 0}),
        (
            "gemma2",
            [LayerDrop(block=[1, 2])],
            {**WINDOWS, "attn_logit_softcapping": 5.0, "attn_implementation": "eager"},
        ),
        ("gemma3_text", [LayerDrop(block=[6, 8])], {**WINDOWS, "num_hidden_layers": 9}),
        (
            "gemma3_text",
            [LayerDrop(block=[6, 8])],
            {**WINDOWS, "num_hidden_layers": 9, "rope_parameters": LAYERS},
        ),
    ],
    ids=str,
)
def test_every_architecture_is_computed_as_transformers_does(
    name: str, plan: list[Any], overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = spread_checkpoint(tmp_path / "whole", name, **overrides)
    done = slimformer.export(tmp_path / "whole", plan, tmp_path / "slim", to="gguf", dtype="f32")
    slimformer.patch(model, *plan)
    ids = torch.randint(3, 300, (4, 12), generator=torch.Generator().manual_seed(1)).tolist()
    # GELU is looked up in a table in half precision there.
    compare(done.folder / "model.gguf", model, ids, 300, 1e-2 if name.startswith("gemma") else 1e-3)


@pytest.mark.parametrize("split", BPE)
def test_texts_are_cut_as_by_the_tokenizer(split: str, tmp_path: Path) -> None:
    folder = bpe_checkpoint(tmp_path / "whole", "llama", split)
    slimformer.export(folder, BLOCKS, tmp_path / "slim", to="gguf")
    engine, tokenizer = LlamaCpp(tmp_path / "slim/model.gguf"), AutoTokenizer.from_pretrained(folder)
    assert {text: engine.tokens(text) for text in TEXTS} == {
        text: tokenizer(text).input_ids for text in TEXTS
    }

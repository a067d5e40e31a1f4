"""Tiny random models, one for every structure in the table."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

import slimformer

COMMON = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
          "eos_token_id": 2, "max_position_embeddings": 128}  # fmt: skip
DECODERS = {
    "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 16}, "gemma3_text": {"head_dim": 8, "sliding_window": 16},
    "olmo2": {}, "phi3": {}, "phi": {}, "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4}, "gpt_neox": {},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip
ENCODERS = {"bert": {}, "roberta": {"max_position_embeddings": 130}, "mpnet": {},
            "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 4, "n_heads": 4},
            "modernbert": {"cls_token_id": 1, "sep_token_id": 2}}  # fmt: skip


def tiny_model(name: str, **overrides: object) -> PreTrainedModel:
    """A float32 model in eval mode, with the same weights for the same name every time."""
    torch.manual_seed(0)
    own = ENCODERS.get(name, DECODERS.get(name, {}))
    config = AutoConfig.for_model(name, **{**COMMON, **own, **overrides})
    factory = AutoModel if name in ENCODERS else AutoModelForCausalLM
    return factory.from_config(config).eval()


def dropped(model: Any) -> dict[int, list[str]]:
    """The sublayers of a patched model that do not run."""
    rows = slimformer.status(model)
    gone = {index: [kind for kind in of if of[kind] == "dropped"] for index, of in rows.items()}
    return {index: kinds for index, kinds in gone.items() if kinds}

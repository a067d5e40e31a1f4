"""What a prefill of a decoder has to multiply: the promise that times are held against."""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig

from slimformer.model.layer_parts import Kind


def flops(
    config: PretrainedConfig, tokens: int, kept: Callable[[int, Kind], float] = lambda layer, kind: 1.0
) -> float:
    """Multiplications of a prefill, without the head: linear layers, and causal scores and their use.

    Args:
        config: The model's.
        tokens: Of the prompt.
        kept: The part of the tokens that a sublayer computes; keys and values are those of all, or of none.
    """
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    query = 2 * config.hidden_size * heads * head_dim
    key = 2 * config.hidden_size * config.num_key_value_heads * head_dim
    scores = 2 * heads * head_dim * tokens / 2
    mlp = 3 * config.hidden_size * config.intermediate_size
    total = 0.0
    for layer in range(config.num_hidden_layers):
        queries = kept(layer, "attention")
        total += queries * (query + scores) + (key if queries else 0.0) + kept(layer, "mlp") * mlp
    return tokens * total

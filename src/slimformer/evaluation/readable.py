"""Whether a model predicts tokens, and how many it reads at once."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.model.anatomy import Anatomy
from slimformer.transforms.transform import position_offset


def longest(anatomy: Anatomy, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that a model and its tokenizer say they can read."""
    config = anatomy.stack.config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions is None:
        return int(tokenizer.model_max_length)
    return int(min(tokenizer.model_max_length, positions - position_offset(anatomy)))


def predicts_tokens(model: PreTrainedModel, anatomy: Anatomy) -> bool:
    """Whether a model predicts next tokens, and not embeddings."""
    return anatomy.causal and model.get_output_embeddings() is not None

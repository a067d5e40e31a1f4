"""What is exported: SmolLM2, tiny random models of every family, and plans; and what the engines are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from slimformer import LayerDrop
from sweep.models import spread
from tiny_checkpoints import bpe_tokenizer
from tiny_models import tiny_model

PROMPTS = [f"{how} {what}" for how in ("Here is a short text about", "The history of", "A question on", "Once,",
                                       "Write down what you know of") for what in
           ("rain", "old ships", "bread", "the moon", "two cats", "a city by the sea", "numbers", "snow", "trade",
            "music")]  # fmt: skip


def fitted(replace: Any, *sublayers: tuple[Any, int], hidden: int = 576) -> LayerDrop:
    """Random small weights in place of sublayers."""
    weights = {}
    for kind, layer in sublayers:
        generator = torch.Generator().manual_seed(layer)
        weights[f"{kind}.{layer}.bias"] = torch.randn(hidden, generator=generator) / 50
        weights[f"{kind}.{layer}.weight"] = torch.randn(hidden, hidden, generator=generator) / 500
    named = {kind: [layer for of, layer in sublayers if of == kind] for kind in ("attention", "mlp")}
    return LayerDrop(**named, replace=replace, weights=weights)


# By what is dropped: blocks, attentions, sublayers of both kinds, and sublayers with something in their place.
PLANS = {
    "blocks": [LayerDrop(block=[10, 20, 22])],
    "attentions": [LayerDrop(attention=[12, 20, 22, 24])],
    "joint": [LayerDrop(attention=[12, 20, 22, 24], mlp=[15, 22, 25])],
    "replaced": [
        fitted("filter", ("attention", 0), ("attention", 20), ("mlp", 21)),
        fitted("mean", ("attention", 24), ("mlp", 12), ("mlp", 0)),
        LayerDrop(attention=[12], mlp=[14]),
    ],
}


def spread_checkpoint(folder: Path, name: str, **overrides: object) -> PreTrainedModel:
    """A tiny model under whose weights every part counts, which is saved with a tokenizer too."""
    tokenizer = bpe_tokenizer("gpt-2")
    model = tiny_model(name, vocab_size=len(tokenizer), **overrides)
    spread(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model

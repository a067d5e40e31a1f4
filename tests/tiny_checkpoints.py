"""Tiny models on disk with a tokenizer that fits them, as the command line loads them."""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import tiny_model

_CHARACTERS = string.ascii_lowercase + string.ascii_uppercase + " .,\n()"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, as many as a tiny model's vocabulary holds."""
    words = ["<pad>", "<bos>", "<eos>", "<unk>", *_CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **special)


def tiny_checkpoint(folder: Path, name: str, **overrides: object) -> str:
    """Save a tiny model and its tokenizer; returns the folder as the command line takes it."""
    tiny_model(name, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)

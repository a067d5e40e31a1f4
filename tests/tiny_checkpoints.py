"""Tiny models on disk with a tokenizer that fits them, as the command line loads them."""

from __future__ import annotations

import string
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
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


# The splits in front of the merges that llama.cpp knows, as checkpoints' tokenizers write them.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {"qwen2": _WORDS + r"\p{N}" + _REST, "llama-bpe": _WORDS + r"\p{N}{1,3}" + _REST}
_TEXT = " ".join((sys.__doc__ or "", string.__doc__ or "", str.__doc__ or "", int.__doc__ or ""))
BPE = ("gpt-2", "smollm", "qwen2", "llama-bpe", "dbrx", "pieces", "pieces, space in front")


def bpe_tokenizer(split: str) -> PreTrainedTokenizerFast:
    """Merges of bytes learnt from a little text, or of pieces, with a special token in front of every text."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("gpt-2", "smollm"))
    before: list[pre_tokenizers.PreTokenizer] = []
    if split == "smollm":
        before = [pre_tokenizers.Digits(individual_digits=True)]
    elif split in ("qwen2", "llama-bpe", "dbrx"):
        pattern = Regex(_SPLITS["llama-bpe" if split == "dbrx" else split])
        before = [pre_tokenizers.Split(pattern, "isolated")]
    tokenizer = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    if split.startswith("pieces"):
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, byte_level]) if before else byte_level
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = [] if split.startswith("pieces") else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([_TEXT], trainer)
    if split.startswith("pieces"):
        tokenizer = _pieces(tokenizer, special, "space" in split)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    named = {name: f"<{name[:3]}>" for name in ("pad_token", "bos_token", "eos_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=128, **named)


def _pieces(trained: Tokenizer, special: list[str], space_in_front: bool) -> Tokenizer:
    """As a vocabulary of scored pieces is written: every pair that gives a piece, those of the best piece first."""
    learnt = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    singles = [piece for piece, _ in learnt if len(piece) == 1]
    longer = [piece for piece, _ in learnt if len(piece) > 1 and piece not in special][:100]
    names = [*special, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *longer, *singles]
    vocabulary = {name: number for number, name in enumerate(dict.fromkeys(names))}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in longer
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend("▁"), *steps]) if space_in_front else steps[0]
    )
    tokenizer.add_special_tokens(special)
    return tokenizer


def bpe_checkpoint(folder: Path, name: str, split: str = "gpt-2", **overrides: object) -> str:
    """A tiny model with such a tokenizer; returns the folder as the command line takes it."""
    tokenizer = bpe_tokenizer(split)
    tiny_model(name, vocab_size=len(tokenizer), **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

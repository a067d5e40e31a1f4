"""Rows of text to train on, and rows that are not trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from slimformer.errors import DataError
from slimformer.text.held_out import split_texts
from slimformer.text.sources import characters_for, load_texts, token_batches_padded, token_blocks

# Of texts, and of batches that are given as they are, one in so many is measured on.
_EVERY = 5


def training_rows(
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    text_field: str,
    hold_out: bool,
    tokens: int,
    count: int,
    held_out: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor, str]:
    """As many rows as a training takes, or all there are.

    Args:
        tokenizer: The model's.
        data: As for `slimformer.calibrate`.
        text_field: The field with the text.
        hold_out: Take the second part from every fifth text, which the first does not read; else from the last rows.
        tokens: Tokens per row.
        count: How many rows are taken to train on.
        held_out: How many rows the second part may have; 0 for none.
        seed: Decides which.

    Returns:
        Rows to train on and rows to measure on `[rows, tokens]`, and where they came from.

    Raises:
        DataError: If either part has no row.
    """
    texts, source = _read(data, text_field, (count + _EVERY * held_out) * tokens)
    cut: dict[str, Any] = {"sequence_length": tokens, "seed": seed}
    if hold_out:
        kept, others = split_texts(texts)
        read = token_blocks(kept, tokenizer, count=count, **cut)
        rest = token_blocks(others, tokenizer, count=held_out, **cut) if held_out else read[:0]
    else:
        rows = token_blocks(texts, tokenizer, count=count + held_out, **cut)
        last = min(held_out, len(rows) // 5)
        read, rest = rows[: len(rows) - last], rows[len(rows) - last :]
    if not len(read) or (held_out and not len(rest)):
        raise DataError(
            f"Training needs a row of {tokens} tokens to read and one to measure on, and {source} gives {len(read)} "
            f"and {len(rest)}. Give more text, or a smaller length."
        )
    return read, rest, source


def training_texts(
    tokenizer: PreTrainedTokenizerBase,
    data: Any,
    *,
    text_field: str,
    hold_out: bool,
    tokens: int,
    count: int,
    held_out: int,
    seed: int = 0,
) -> tuple[Tensor, Tensor, str]:
    """As `training_rows`, with a text of its own in every row.

    Returns:
        Ids and their mask, to train on and to measure on, `[rows, 2, tokens]`, and where they came from.

    Raises:
        DataError: If either part has no text.
    """
    texts, source = _read(data, text_field, (count + _EVERY * held_out) * tokens)
    if hold_out:
        kept, others = split_texts(texts)
    else:
        last = min(held_out, len(texts) // 5)
        kept, others = texts[: len(texts) - last], texts[len(texts) - last :]
    if not kept or not others:
        raise DataError(
            f"Training needs a text to read and one to measure on, and {source} gives {len(kept)} and {len(others)}. "
            "Give more texts."
        )
    parts = []
    for part, most in ((kept, count), (others, held_out)):
        batch = token_batches_padded(part, tokenizer, max_length=tokens, count=most, seed=seed)
        parts.append(torch.stack([batch["input_ids"], batch["attention_mask"]], 1))
    return parts[0], parts[1], source


def _read(data: Any, text_field: str, tokens: int) -> tuple[list[str], str]:
    given = os.fspath(data) if isinstance(data, os.PathLike) else data
    return load_texts(given, text_field=text_field, enough=characters_for(tokens))


def examples(data: Any) -> list[Mapping[str, Tensor]] | None:
    """The batches among what may be given as data: inputs that a processor made; None for any kind of text.

    Raises:
        DataError: If a batch has no token ids.
    """
    if not isinstance(data, Sequence) or isinstance(data, str) or not data or isinstance(data[0], str):
        return None
    for number, batch in enumerate(data):
        ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise DataError(
                "Expected strings, or what a processor makes of images with text, with input_ids [texts, tokens]; "
                f"item {number} is {type(batch).__name__}{'' if ids is None else f' with {type(ids).__name__}'}."
            )
    return [dict(batch) for batch in data]


def rows_of_examples(batches: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The numbers of the batches to train on, and of every fifth to measure on, each `[batches, 1]`.

    Raises:
        DataError: If there is only one.
    """
    numbers = torch.arange(len(batches))[:, None]
    if len(batches) < 2:
        raise DataError("Training needs two batches: one to read and one to measure on. Give more.")
    held = numbers % _EVERY == min(_EVERY, len(batches)) - 1
    return numbers[~held[:, 0]], numbers[held[:, 0]]

"""Parallel context windows: the baseline that every extension of an encoder is to be compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from slimformer.errors import CalibrationError, DataError
from slimformer.model.anatomy import in_eval_mode

Token = TypeVar("Token")


def windows(tokens: Sequence[Token], length: int) -> list[Sequence[Token]]:
    """Cut a text into pieces of `length`, without overlap; the last piece is the text's last `length` tokens.

    Args:
        tokens: The text's tokens, or anything else in order.
        length: How many a piece holds. Tokens that the encoder adds to every piece, such as [CLS] and [SEP], are not
            counted here: subtract them from what it reads.

    Returns:
        The pieces in order; the text itself where it fits.

    Raises:
        DataError: If there is no token, or the length is not positive.

    Example:
        >>> windows(range(10), 4)
        [range(0, 4), range(4, 8), range(6, 10)]
        >>> windows("abc", 4)
        ['abc']
    """
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise DataError(f"windows(length=...) takes a whole number from 1 up, got {length!r}.")
    count = len(tokens)
    if count == 0:
        raise DataError("A text without tokens has no windows. Remove empty texts.")
    if count <= length:
        return [tokens]
    starts = [*range(0, count - length, length), count - length]
    return [tokens[start : start + length] for start in starts]


def embed_in_windows(
    texts: Sequence[Sequence[Token]], length: int, embed: Callable[[list[Sequence[Token]]], Tensor]
) -> Tensor:
    """Embed long texts window by window (PCW): each window on its own, then the normalised mean.

    A text that fits in one window has the embedding that `embed` gives it, unchanged.

    Args:
        texts: The tokens of each text.
        length: Tokens of a window, as for `windows`.
        embed: Embeds pieces of texts, all windows of all texts in one call: `[windows, hidden]`, floating-point.

    Returns:
        `[len(texts), hidden]`.

    Raises:
        DataError: If a text has no token, or `embed` does not give one vector per window.

    Example:
        >>> import torch
        >>> first_token = lambda pieces: torch.tensor([[float(piece[0]), 1.0] for piece in pieces])
        >>> embed_in_windows([[0, 1, 2, 3], [5]], 2, first_token)
        tensor([[0.7071, 0.7071],
                [5.0000, 1.0000]])
    """
    pieces = [windows(text, length) for text in texts]
    flat = [piece for of_text in pieces for piece in of_text]
    if not flat:
        raise DataError("embed_in_windows got no texts.")
    vectors = embed(flat)
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or vectors.shape[0] != len(flat):
        came = tuple(vectors.shape) if isinstance(vectors, Tensor) else type(vectors).__name__
        raise DataError(f"embed(...) must give one vector for each of {len(flat)} windows, got {came}.")
    means = [
        part[0] if len(part) == 1 else F.normalize(part.mean(0), dim=0)
        for part in vectors.split([len(of_text) for of_text in pieces])
    ]
    return torch.stack(means)


def encode_in_windows(
    model: Any, texts: Sequence[str], length: int | None = None, *, prompt: str = "", batch_size: int = 32
) -> Tensor:
    """Embed long texts with a SentenceTransformer, window by window: what `model.encode` would cut off is read too.

    Args:
        model: A SentenceTransformer, patched or not.
        texts: Of any length.
        length: Tokens that the model reads at a time, special tokens and prompt counted; None for its own
            `max_seq_length`.
        prompt: Put in front of every window, as the model's card says for documents.
        batch_size: Windows per forward; neighbours in length go together.

    Returns:
        `[len(texts), hidden]` on the CPU. A text that fits has the embedding that `encode` gives it.

    Raises:
        CalibrationError: If the model is no SentenceTransformer.
        DataError: If a text has no token, or the length leaves no room for any.

    Example:
        >>> from sentence_transformers import SentenceTransformer  # doctest: +SKIP
        >>> model = SentenceTransformer("all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> encode_in_windows(model, ["A whole book ..."], 256).shape  # doctest: +SKIP
        torch.Size([1, 384])
    """
    if not hasattr(model, "encode") or not hasattr(model, "tokenizer"):
        raise CalibrationError(f"encode_in_windows takes a SentenceTransformer, got {type(model).__name__}.")
    tokenizer: Any = model.tokenizer
    before, after = _special_tokens(tokenizer)
    before = before + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    whole = int(model.max_seq_length) if length is None else length
    room = whole - len(before) - len(after)
    if room < 1:
        raise DataError(
            f"encode_in_windows(length={whole}) has no room for text besides {len(before) + len(after)} special "
            "tokens and the prompt. Give a greater length."
        )
    tokens = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]

    @torch.no_grad()
    def embed(pieces: list[Sequence[int]]) -> Tensor:
        by_length = sorted(range(len(pieces)), key=lambda number: len(pieces[number]))
        found = []
        for start in range(0, len(pieces), batch_size):
            rows = [[*before, *pieces[n], *after] for n in by_length[start : start + batch_size]]
            batch = tokenizer.pad({"input_ids": rows}, return_tensors="pt")
            given = {name: batch[name].to(model.device) for name in ("input_ids", "attention_mask")}
            found.append(model(given)["sentence_embedding"].cpu())
        return torch.cat(found)[torch.tensor(by_length).argsort()]

    with in_eval_mode(model):
        return embed_in_windows(tokens, room, embed)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What a tokenizer puts in front of a text and behind it."""
    encoded = tokenizer("a", return_special_tokens_mask=True)
    special = encoded["special_tokens_mask"]
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return encoded["input_ids"][:first], encoded["input_ids"][last:]

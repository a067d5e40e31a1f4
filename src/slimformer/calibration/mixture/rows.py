"""Rows of a mixture to train on, and others to measure on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.calibration.mixture.own_words import Writer
from slimformer.calibration.mixture.sources import BUILT_IN, COPYING, OWN_WORDS, Source
from slimformer.evaluation.panel.builtin import drawable_tokens
from slimformer.text.progress import Stages
from slimformer.text.rows import training_rows, training_texts
from slimformer.text.sources import tokens_in_front

# Rows of every source that are measured on, so that none of them is judged by a single row.
_LEAST_HELD_OUT = 2
# Of texts that the model writes, one in so many is measured on.
_EVERY = 5
# Tokens of the shortest sequence that repeats.
_SHORTEST = 16
# More tokens than this need not be written: rows are read several times instead.
_MOST_WRITTEN = 2**22


@dataclass(frozen=True)
class Mixture:
    """Rows of several sources.

    Attributes:
        read: To train on, those of every source as often as its share says `[rows, tokens]`.
        read_of: The source of each of these.
        held_out: To measure on `[rows, tokens]`.
        of: The source of each of these.
        record: What a plan's provenance says of them: share, rows that differ, and origin by source.
    """

    read: Tensor
    read_of: list[str]
    held_out: Tensor
    of: list[str]
    record: dict[str, Any]

    def batches(self, size: int) -> tuple[list[Tensor], list[str]]:
        """What is measured on, in batches of one source each, and their sources."""
        found, names = [], []
        for name in dict.fromkeys(self.of):
            own = torch.tensor([of == name for of in self.of])
            parts = self.held_out[own].split(size)
            found += parts
            names += [name] * len(parts)
        return found, names


def mixture_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    *,
    text_field: str,
    hold_out: bool,
    tokens: int,
    count: int,
    held_out: int,
    seed: int = 0,
    seconds: float = math.inf,
    cache: str | os.PathLike[str] | None = None,
    stages: Stages | None = None,
    least: int = 1,
) -> Mixture:
    """Rows of tokens for a decoder.

    Args:
        model: The dense model, for what it writes itself.
        tokenizer: Its tokenizer.
        sources: What is mixed.
        text_field: As for `training_rows`.
        hold_out: As for `training_rows`.
        tokens: Tokens per row.
        count: How many rows a training reads.
        held_out: How many rows there are to measure on, or two of every source.
        seed: Decides which, and what is written.
        seconds: How long the model may write.
        cache: Where what it wrote is kept; None keeps nothing.
        stages: Where a progress bar is shown.
        least: Rows of every source, however small its share.

    Raises:
        DataError: If a source has no row to train on, or none to measure on.
        CalibrationError: If the model is to write and writes nothing.
    """
    parts: dict[str, tuple[Tensor, Tensor, str]] = {}
    # What is written takes longest, and comes when the text is known to be there.
    for source in sorted(sources, key=lambda source: source.data == OWN_WORDS):
        wanted = max(round(count * source.share), least)
        few = max(round(held_out * source.share), min(_LEAST_HELD_OUT, held_out))
        if source.data == OWN_WORDS:
            writer = Writer(
                model, tokenizer, tokens, drawable_tokens(tokenizer), tokens_in_front(tokenizer), seed, cache
            )
            needed = min((wanted + _EVERY * few) * tokens, _MOST_WRITTEN)
            texts = writer.written(needed, seconds, stages)
            rows, others, origin = _packed(texts, writer.front, tokens, few)
        elif source.data == COPYING:
            made = copies(drawable_tokens(tokenizer), tokens_in_front(tokenizer), tokens, wanted + few, seed)
            rows, others, origin = made[few:], made[:few], "random sequences that repeat"
        else:
            given = None if source.data == BUILT_IN else source.data
            rows, others, origin = training_rows(
                tokenizer,
                given,
                text_field=text_field,
                hold_out=hold_out,
                tokens=tokens,
                count=wanted,
                held_out=few,
                seed=seed,
            )
        parts[source.name] = rows[:wanted], others[:few], origin
    read, read_of, rest, of = [], [], [], []
    record: dict[str, Any] = {}
    for source in sources:
        rows, others, origin = parts[source.name]
        read.append(_shared(rows, max(round(count * source.share), least), len(sources)))
        read_of += [source.name] * len(read[-1])
        rest.append(others)
        of += [source.name] * len(others)
        record[source.name] = {"share": source.share, "rows": len(rows), "from": origin}
    return Mixture(torch.cat(read), read_of, torch.cat(rest), of, record)


def mixture_texts(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[Source],
    *,
    text_field: str,
    hold_out: bool,
    tokens: int,
    count: int,
    held_out: int,
    seed: int = 0,
) -> Mixture:
    """As `mixture_rows` for encoders, with a text and its mask in every row `[rows, 2, tokens]`.

    Raises:
        DataError: If a source has no text to train on, or none to measure on.
    """
    read, read_of, rest, of = [], [], [], []
    record: dict[str, Any] = {}
    for source in sources:
        wanted = max(round(count * source.share), 1)
        rows, others, origin = training_texts(
            tokenizer,
            None if source.data == BUILT_IN else source.data,
            text_field=text_field,
            hold_out=hold_out,
            tokens=tokens,
            count=wanted,
            held_out=max(round(held_out * source.share), _LEAST_HELD_OUT),
            seed=seed,
        )
        read.append(_shared(rows, wanted, len(sources)))
        read_of += [source.name] * len(read[-1])
        rest.append(others)
        of += [source.name] * len(others)
        record[source.name] = {"share": source.share, "rows": len(rows), "from": origin}
    longest = max(rows.shape[2] for rows in (*read, *rest))
    pad = torch.tensor([tokenizer.pad_token_id, 0])[None, :, None]
    padded = [
        [torch.cat([rows, pad.expand(len(rows), -1, longest - rows.shape[2])], 2) for rows in part]
        for part in (read, rest)
    ]
    return Mixture(torch.cat(padded[0]), read_of, torch.cat(padded[1]), of, record)


def _shared(rows: Tensor, wanted: int, sources: int) -> Tensor:
    """A short source is read several times, so that its share is what was asked for."""
    if sources == 1:
        return rows
    times = math.ceil(wanted / len(rows))
    return rows.repeat(times, *[1] * (rows.dim() - 1))[:wanted]


def copies(words: Sequence[int], front: Sequence[int], tokens: int, count: int, seed: int) -> Tensor:
    """Rows of random sequences that come again `[count, tokens]`; those that do stand in the second half.

    Every other row repeats one sequence, a short one or up to half of the row, again and again. The others hold many
    short ones, which come again in another order, so that each has to be looked up by how it begins.

    Example:
        >>> rows = copies(range(10, 60), [1], tokens=65, count=3, seed=0)
        >>> rows.shape, rows[:, 0].tolist()
        (torch.Size([3, 65]), [1, 1, 1])
    """
    generator = torch.Generator().manual_seed(seed)
    room = tokens - len(front)
    known = torch.tensor(list(words))
    rows = []
    for number in range(count):
        row = _repeated(known, room, generator) if number % 2 == 0 else _looked_up(known, room, generator)
        rows.append(torch.cat([torch.tensor(list(front), dtype=torch.long), row]))
    return torch.stack(rows)


def _repeated(known: Tensor, room: int, generator: torch.Generator) -> Tensor:
    most = max(room // 2, 1)
    length = int(torch.randint(min(_SHORTEST, most), most + 1, (1,), generator=generator))
    run = known[torch.randint(len(known), (length,), generator=generator)]
    return run.repeat(room // length + 1)[:room]


def _looked_up(known: Tensor, room: int, generator: torch.Generator) -> Tensor:
    length = min(_SHORTEST, max(room // 2, 1))
    runs = known[torch.randint(len(known), (room // 2 // length, length), generator=generator)]
    again = runs[torch.randperm(len(runs), generator=generator)]
    # What does not divide stands in front of both.
    rest = known[torch.randint(len(known), (room - 2 * runs.numel(),), generator=generator)]
    return torch.cat([rest, runs.flatten(), again.flatten()])


def _packed(
    texts: Sequence[Sequence[int]], front: Sequence[int], tokens: int, held_out: int
) -> tuple[Tensor, Tensor, str]:
    """Texts one behind the other in rows, and every fifth of them in rows to measure on."""
    origin = f"the dense model, {len(texts)} texts, {sum(map(len, texts))} tokens"
    if not held_out:
        rows = _cut(texts, front, tokens)
        return rows, rows[:0], origin
    others = texts[_EVERY - 1 :: _EVERY] or texts[-1:]
    kept = [text for number, text in enumerate(texts) if number % _EVERY != _EVERY - 1] or texts[:1]
    return _cut(kept, front, tokens), _cut(others, front, tokens)[:held_out], origin


def _cut(texts: Sequence[Sequence[int]], front: Sequence[int], tokens: int) -> Tensor:
    ids = [token for text in texts for token in text]
    room = tokens - len(front)
    # Little text is read over again to fill a row.
    ids = ids * math.ceil(room / len(ids)) if len(ids) < room else ids
    rows = torch.tensor(ids[: len(ids) // room * room]).view(-1, room)
    return torch.cat([torch.tensor(list(front), dtype=torch.long).expand(len(rows), -1), rows], 1)

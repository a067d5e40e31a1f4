"""The rows of a shard: texts that can be embedded, and rows that cannot, with their reasons."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slimformer.errors import DataError
from slimformer.text.files import checked_text


@dataclass(frozen=True)
class BadRow:
    """A row without an embedding.

    Attributes:
        row: Its number in the corpus, from 0.
        id: What the id column says of it; None where there is none.
        reason: Why it has none.
    """

    row: int
    id: Any
    reason: str

    def line(self) -> str:
        """As a JSON line.

        Example:
            >>> BadRow(3, "d3", "null").line()
            '{"row": 3, "id": "d3", "reason": "null"}'
        """
        return json.dumps({"row": self.row, "id": self.id, "reason": self.reason}, default=str)


@dataclass
class Rows:
    """What was read of a shard.

    Attributes:
        shard: Its number.
        numbers: The numbers of its good rows in the corpus.
        texts: Their texts.
        ids: Their ids; None where the corpus has none.
        bad: Its other rows.
    """

    shard: int
    numbers: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ids: list[Any] | None = None
    bad: list[BadRow] = field(default_factory=list)

    def add(self, number: int, value: Any, id: Any, why: str = "") -> None:
        """Take in one more row, as good or as bad; `why` is what is known to be wrong with it already."""
        text, reason = (None, why) if why else text_of(value)
        if text is None:
            self.bad.append(BadRow(number, id, reason))
            return
        self.numbers.append(number)
        self.texts.append(text)
        if self.ids is not None:
            self.ids.append(id)

    def without(self, reasons: dict[int, str]) -> Rows:
        """The rows without some of the good ones, which are bad for reasons that were found later.

        Args:
            reasons: By place among the good rows.
        """
        if not reasons:
            return self
        ids: Sequence[Any] = self.ids if self.ids is not None else [None] * len(self.numbers)
        found = [BadRow(self.numbers[place], ids[place], why) for place, why in sorted(reasons.items())]
        kept = [place for place in range(len(self.numbers)) if place not in reasons]
        return Rows(
            self.shard,
            [self.numbers[place] for place in kept],
            [self.texts[place] for place in kept],
            None if self.ids is None else [self.ids[place] for place in kept],
            sorted([*self.bad, *found], key=lambda bad: bad.row),
        )


def text_of(value: Any) -> tuple[str | None, str]:
    """The text in a value of any kind, or why there is none.

    Example:
        >>> text_of(b"caf\\xc3\\xa9"), text_of(b"caf\\xe9"), text_of(" "), text_of(7)
        (('café', ''), (None, 'broken UTF-8: byte 0xe9 behind 3 bytes'), (None, 'empty'), (None, 'no text but int'))
    """
    if value is None:
        return None, "null"
    if isinstance(value, float) and np.isnan(value):
        return None, "null"
    if isinstance(value, (bytes, bytearray, memoryview)):
        content = bytes(value)
        try:
            value = content.decode("utf-8")
        except UnicodeDecodeError as error:
            return (
                None,
                f"broken UTF-8: byte 0x{content[error.start]:02x} behind {error.start} bytes",
            )
    if not isinstance(value, str):
        return None, f"no text but {type(value).__name__}"
    if not value.strip():
        return None, "empty"
    try:
        return checked_text(value, "It"), ""
    except DataError:
        return None, "broken UTF-8: half of a surrogate pair"


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of texts in batches: the longest first, each of at most so many tokens if all are as long as its longest.

    A text that is longer than that by itself is a batch of its own. The same lengths always give the same batches.

    Args:
        lengths: Tokens of each text.
        budget: Tokens of a batch, padding included.

    Example:
        >>> list(token_batches([3, 9, 4, 8, 3], 12))
        [[1], [3], [2, 0, 4]]
    """
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def bad_lines(bad: Iterable[BadRow]) -> str:
    """Bad rows as JSON lines."""
    return "".join(row.line() + "\n" for row in bad)

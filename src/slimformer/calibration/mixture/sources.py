"""Which sources a mixture has, and how much each of them counts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from slimformer.errors import DataError

OWN_WORDS, BUILT_IN, COPYING = "own-words", "built-in", "copying"
NAMED = (OWN_WORDS, BUILT_IN, COPYING)
# What `generate` will meet counts most. Text of one's own stands in the place of what is built in.
DEFAULT: Mapping[str, float] = {OWN_WORDS: 6.0, BUILT_IN: 3.0, COPYING: 1.0}
_EXPECTED = (
    "Expected a number above 0 for every source, as in {'mine.jsonl': 2, 'own-words': 1}, or "
    "--data mine.jsonl=2 --data own-words"
)


class Source(NamedTuple):
    """One of them.

    Attributes:
        data: As for `load_texts`, or one of `NAMED`.
        share: Its part of all rows.
    """

    data: Any
    share: float

    @property
    def name(self) -> str:
        """For tables: a file's name without its folders, which say more about a machine than about the text.

        Example:
            >>> Source("own-words", 0.5).name, Source(["one text", "another"], 0.5).name
            ('own-words', 'texts')
        """
        if not isinstance(self.data, (str, os.PathLike)):
            return "texts"
        name = os.fspath(self.data)
        return os.path.basename(name) if os.path.isfile(os.path.expanduser(name)) else name


def sources_of(data: Any, decoder: bool = True) -> list[Source]:
    """The sources that are asked for.

    Args:
        data: A mapping from sources to weights; None for what `DEFAULT` says; or one source, which stands in the place
            of the built-in text there. Encoders, which write nothing, read that alone.
        decoder: Whether the model predicts tokens.

    Raises:
        DataError: If there is no source, a weight is no number above 0, or an encoder is to write.

    Example:
        >>> sources_of({"a.txt": 3, "own-words": 1})
        [Source(data='a.txt', share=0.75), Source(data='own-words', share=0.25)]
        >>> sources_of("a.txt")[1], sources_of(None, decoder=False)
        (Source(data='a.txt', share=0.3), [Source(data='built-in', share=1.0)])
    """
    weights = data if isinstance(data, Mapping) else None
    if weights is None:
        text = BUILT_IN if data is None else data
        known = isinstance(text, str) and text in NAMED and text != BUILT_IN
        parts = DEFAULT if decoder and not known else {BUILT_IN: 1.0}
        total = sum(parts.values())
        found = [Source(text if name == BUILT_IN else name, weight / total) for name, weight in parts.items()]
    elif not weights:
        raise DataError(f"The mixture has no source. {_EXPECTED}.")
    else:
        for source, weight in weights.items():
            if not isinstance(source, (str, os.PathLike)):
                raise DataError(f"A source of a mixture is a name or a path, got {source!r}. {_EXPECTED}.")
            if (
                isinstance(weight, bool)
                or not isinstance(weight, (int, float))
                or not (weight > 0 and math.isfinite(weight))
            ):
                raise DataError(f"The weight of {os.fspath(source)!r} is {weight!r}. {_EXPECTED}.")
        total = sum(weights.values())
        found = [Source(source, weight / total) for source, weight in weights.items()]
    written = [s.data for s in found if isinstance(s.data, str) and s.data in (OWN_WORDS, COPYING)]
    if written and not decoder:
        raise DataError(
            f"The source {written[0]!r} is for decoders, which predict tokens, and this model makes embeddings. Give "
            "text."
        )
    return found


def weighted(values: Sequence[str]) -> Any:
    """Sources as they are typed, each with `=weight` behind it or a weight of 1; one without stays as it is.

    Raises:
        DataError: If a weight is no number, or a source is named twice.

    Example:
        >>> weighted(["a.txt", "b.txt=2"])
        {'a.txt': 1.0, 'b.txt': 2.0}
        >>> weighted(["a.txt"]), weighted([])
        ('a.txt', None)
    """
    found: dict[str, float] = {}
    for value in values:
        source, weight = _split(value)
        if source in found:
            raise DataError(
                f"The source {source!r} is given twice. Give it once, with the sum of its weights."
            )
        found[source] = weight
    if len(values) < 2 and "=" not in "".join(values):
        return values[0] if values else None
    return found


def _split(value: str) -> tuple[str, float]:
    source, equals, weight = value.rpartition("=")
    # A file may have an equals sign in its name.
    if not equals or os.path.exists(os.path.expanduser(value)):
        return value, 1.0
    try:
        return source, float(weight)
    except ValueError:
        raise DataError(f"The weight of {source!r} is {weight!r}. {_EXPECTED}.") from None

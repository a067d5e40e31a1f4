"""Which part of a text calibration leaves alone, so that a plan can be measured on text it was not chosen by."""

from __future__ import annotations

from collections.abc import Sequence

_EVERY = 5


def split_texts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Every fifth text is held out; of fewer than five texts, the last fifth of each one.

    Taken at regular distances, the held-out texts are of the same kind as the others, also where a source is sorted.
    A text that stands in both parts is left out of the held-out one.

    Args:
        texts: Texts, as `load_texts` returns them.

    Returns:
        The texts for calibration and the held-out ones, each in their order.

    Example:
        >>> split_texts(["a", "b", "c", "d", "e", "f"])
        (['a', 'b', 'c', 'd', 'f'], ['e'])
        >>> split_texts(["one two three four five"])
        (['one two three four'], ['five'])
    """
    if len(texts) >= _EVERY:
        kept = [text for index, text in enumerate(texts) if index % _EVERY != _EVERY - 1]
        held_out = texts[_EVERY - 1 :: _EVERY]
    else:
        cuts = [_last_fifth(text) for text in texts]
        kept = [text[:cut].rstrip() for text, cut in zip(texts, cuts, strict=True)]
        held_out = [text[cut:].lstrip() for text, cut in zip(texts, cuts, strict=True)]
    read = set(kept)
    return [text for text in kept if text], [text for text in held_out if text and text not in read]


def _last_fifth(text: str) -> int:
    """Where the last fifth starts, moved to the word's end."""
    start = len(text) * (_EVERY - 1) // _EVERY
    return next((i for i in range(start, len(text)) if text[i].isspace()), len(text))

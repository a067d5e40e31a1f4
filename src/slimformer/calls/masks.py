"""What attention masks say: which tokens are text, which keys there are for whom, and where texts are packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# So many places of a mask are read at a time: a mask of a long prompt is as much memory as can be spared.
_PLACES = 2**24
# Any distance up to which keys are seen, found in the mask itself.
ANY_WINDOW = -1


@dataclass(frozen=True, eq=False)
class MaskReading:
    """What the attention mask of one call says, if it says no more than can be said in these words.

    Attributes:
        kind: `"plain"`: a token of a text sees all of its row's text, as far as causality and a sliding window allow.
            `"packed"`: the same of the text that it is in, of several that lie behind each other in its row.
            `"other"`: anything else (biases, trees, keys hidden for some heads or tokens), which only the model's own
            code computes.
        text: Which of the call's tokens are text and no padding, bool `[batch, tokens]`; None of another mask.
        ranges: First and last key (exclusive) of every row's text, int64 `[batch, 2]`; None where texts are packed,
            have holes, or are not known.
    """

    kind: Literal["plain", "packed", "other"]
    text: Tensor | None = None
    ranges: Tensor | None = None


OTHER = MaskReading("other")


def read_mask(
    mask: Any, batch: int, tokens: int, causal: bool, window: int | None = ANY_WINDOW, *, own: bool = False
) -> MaskReading:
    """Read a mask whose last keys are the call's tokens, as in every cache that grows.

    Args:
        mask: `[batch, keys]`, or `[batch, 1, 1 or tokens, keys]` as booleans, as flags or as additions.
        batch: Sequences.
        tokens: Queries.
        causal: Whether the model hides keys after a query where the mask is none of queries and keys.
        window: Keys at this distance or further are hidden, both ways in an encoder; None for no limit.
        own: Whether the caller made the mask. Then a token whose own key is hidden is padding only if it sees nothing:
            what it sees may be what the caller wants to know of it.
    """
    if not isinstance(mask, Tensor) or mask.shape[0] not in (1, batch) or mask.shape[-1] < tokens:
        return OTHER
    if mask.dim() == 2:
        seen = _keys_shown(mask)
        agrees = (mask == seen) | (mask == 0) & seen | is_hidden(mask) & ~seen
        return _read_keys(seen, batch, tokens, agrees=agrees.all())
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[2] not in (1, tokens):
        return OTHER
    if mask.shape[2] < tokens:
        limited = window is not None and ANY_WINDOW != window < mask.shape[3]
        if causal or limited:
            return OTHER
        seen, known = _seen(mask[:, 0, 0])
        return _read_keys(seen, batch, tokens, agrees=known)
    return _read_queries(mask[:, 0], batch, tokens, causal, window, own)


def _seen(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys a mask shows, and whether it shows or hides every key and does nothing else, both bool."""
    if mask.dtype == torch.bool:
        return mask, torch.ones((), dtype=torch.bool, device=mask.device)
    if not mask.is_floating_point():
        # Flags, as DeBERTa's layers get them.
        return mask == 1, ((mask == 0) | (mask == 1)).all()
    seen = mask == 0
    return seen, (seen | is_hidden(mask)).all()


def is_hidden(mask: Tensor) -> Tensor:
    """Which keys a mask hides, of flags or of additions: as good as minus infinity is what hides a key."""
    return mask <= torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask == 0


def _keys_shown(mask: Tensor) -> Tensor:
    """Which keys a mask `[batch, keys]` shows: of flags, or of additions, as Longformer's layers get them."""
    if not mask.is_floating_point():
        return mask.bool()
    # Zeros alone add nothing; as flags they would hide every text.
    return torch.where((mask == 1).any(), mask.bool(), ~is_hidden(mask))


def _read_keys(seen: Tensor, batch: int, tokens: int, agrees: Tensor) -> MaskReading:
    """The reading of a mask that is the same for every query, by the keys `[1 or batch, keys]` that it shows."""
    start, end, whole = _extent(seen)
    known, whole_row = torch.stack([agrees, whole]).tolist()
    if not known:
        return OTHER
    text = seen[:, seen.shape[1] - tokens :].expand(batch, tokens)
    return MaskReading("plain", text, torch.stack([start, end], 1).expand(batch, 2) if whole_row else None)


def _extent(seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First and last key (exclusive) of every row of `[rows, keys]`, and whether all between them are seen."""
    keys = seen.shape[1]
    some, flags = seen.any(1), seen.to(torch.uint8)
    start = torch.where(some, flags.argmax(1), 0)
    end = torch.where(some, keys - flags.flip(1).argmax(1), 0)
    return start, end, (end - start == seen.sum(1)).all()


def _read_queries(
    mask: Tensor, batch: int, tokens: int, causal: bool, window: int | None, own: bool
) -> MaskReading:
    """The reading of a mask `[1 or batch, tokens, keys]`."""
    rows, _, keys = mask.shape
    first, device = keys - tokens, mask.device
    query = torch.arange(first, keys, device=device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    anyone = torch.zeros(rows, keys, dtype=torch.bool, device=device)
    known = torch.ones((), dtype=torch.bool, device=device)
    for part in mask.split(max(1, _PLACES // (rows * keys)), 1):
        seen, two_valued = _seen(part)
        flags = seen.to(torch.uint8)
        parts.append((flags.argmax(2), keys - 1 - flags.flip(2).argmax(2), seen.sum(2)))
        anyone |= seen.any(1)
        known &= two_valued
    low, high, count = (torch.cat(of, 1) for of in zip(*parts, strict=True))
    text = _seen(mask.diagonal(first, 1, 2))[0]
    # Whatever is hidden from itself must be hidden from all, or it is no padding.
    known = known & ~(anyone[:, first:] & ~text).any()
    if own:
        known = known & ~((count > 0) & ~text).any()
    start = _text_starts(low, text, query)
    end = query.expand_as(start) if causal else keys - 1 - _mirrored_starts(high, text, query, keys)
    reach = query - low if causal else torch.maximum(query - low, high - query)
    limit: Tensor | int = (reach + 1).masked_fill(~text, 1).amax()
    if window != ANY_WINDOW:
        limit = keys if window is None else window
    lowest = torch.maximum(start, query - limit + 1)
    highest = end if causal else torch.minimum(end, query + limit - 1)
    # How many keys of text lie between: a row that shows as many, and none outside, shows these.
    before = torch.nn.functional.pad(anyone.cumsum(1), (1, 0))
    between = before.gather(1, highest + 1) - before.gather(1, lowest)
    agrees = (low >= lowest) & (high <= highest) & (count == between)
    known = known & (agrees | ~text).all()
    one_text = ((start == start.masked_fill(~text, -1).amax(1, keepdim=True)) | ~text).all()
    begin, behind, whole = _extent(anyone)
    explained, one, unbroken = torch.stack([known, one_text, whole]).tolist()
    if not explained:
        return OTHER
    ranges = torch.stack([begin, behind], 1).expand(batch, 2) if one and unbroken else None
    return MaskReading("plain" if one else "packed", text.expand(batch, tokens), ranges)


def _text_starts(low: Tensor, text: Tensor, query: Tensor) -> Tensor:
    """Where the text of every query begins, int64 `[rows, tokens]`, if its first token sees nothing before itself.

    Args:
        low: The first key that each query sees.
        text: Which queries are text.
        query: Which keys the queries are, `[tokens]`.
    """
    begins = torch.where(text & (low == query), query, -1).cummax(1).values
    # A text that began in earlier calls: as far as the first token of this one sees.
    earlier = low.gather(1, text.to(torch.uint8).argmax(1, keepdim=True))
    return torch.where(begins < 0, earlier, begins)


def _mirrored_starts(high: Tensor, text: Tensor, query: Tensor, keys: int) -> Tensor:
    """The same read from behind: how far the end of every query's text is from the last key."""
    last = keys - 1
    return _text_starts((last - high).flip(1), text.flip(1), (last - query).flip(0)).flip(1)


def own_key(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    """Whether each token may attend to itself, bool `[batch, tokens]`; None if the mask has an unknown shape.

    Keys end with this call's tokens, as in every cache that grows.
    """
    if mask.dim() == 2 and mask.shape[1] >= tokens:
        return _keys_shown(mask)[:, mask.shape[1] - tokens :].expand(batch, tokens)
    if mask.dim() != 4 or mask.shape[2] not in (1, tokens) or mask.shape[3] < tokens:
        return None
    own = mask[:, 0].expand(-1, tokens, -1).diagonal(mask.shape[3] - tokens, 1, 2)
    return (~is_hidden(own)).expand(batch, tokens)


def keys_seen(mask: Tensor) -> Tensor:
    """Which keys any query sees in any head, bool `[1 or batch, keys]`."""
    if mask.dim() == 2:
        return _keys_shown(mask)
    seen = torch.zeros(mask.shape[0], mask.shape[3], dtype=torch.bool, device=mask.device)
    for head in mask.unbind(1):
        for part in head.split(max(1, _PLACES // (head.shape[0] * head.shape[2])), 1):
            seen |= (~is_hidden(part)).any(1)
    return seen

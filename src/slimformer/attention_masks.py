"""What attention masks say: which tokens are text, and which keys there are for whom."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def own_key(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    """Whether each token may attend to itself, bool `[batch, tokens]`; None if the mask has an unknown shape.

    Keys end with this call's tokens, as in every cache that grows.
    """
    if mask.dim() == 2 and mask.shape[1] >= tokens:
        return mask[:, mask.shape[1] - tokens :].bool().expand(batch, tokens)
    if mask.dim() != 4 or mask.shape[2] not in (1, tokens) or mask.shape[3] < tokens:
        return None
    own = mask[:, 0].expand(-1, tokens, -1).diagonal(mask.shape[3] - tokens, 1, 2)
    return (own if own.dtype == torch.bool else own == 0).expand(batch, tokens)


def key_ranges(mask: Any, batch: int, tokens: int, causal: bool, window: int | None) -> Tensor | None:
    """The ranges of real keys that, with causality and the window, explain a mask; None if nothing does.

    Args:
        mask: `[batch, keys]`, or `[batch, 1, tokens, keys]` as booleans or as additions.
        batch: Sequences.
        tokens: Queries, which are the last of the keys.
        causal: Whether keys after a query are hidden from it.
        window: Keys at this distance or further are hidden, both ways in an encoder; None for no limit.

    Returns:
        int64 `[batch, 2]`.
    """
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4) or (mask.dim() == 4 and mask.shape[1] != 1):
        return None
    keys = mask.shape[-1]
    if keys < tokens:
        return None
    allowed, seen = keys_seen(mask)
    seen = seen.expand(batch, keys)
    some = seen.any(1)
    start = torch.where(some, seen.int().argmax(1), 0)
    end = torch.where(some, keys - seen.flip(1).int().argmax(1), 0)
    key = torch.arange(keys, device=mask.device)
    inside = (key >= start[:, None]) & (key < end[:, None])
    if allowed is None:
        agrees = (inside == seen).all()
    else:
        allowed = allowed.expand(batch, tokens, keys)
        query = torch.arange(keys - tokens, keys, device=mask.device)
        distance = query[:, None] - key
        expected = inside[:, None, :].expand(batch, tokens, keys)
        if causal:
            expected = expected & (distance >= 0)
        if window is not None:
            expected = expected & (distance.abs() < window)
        # What padding tokens see does not matter.
        padding = ~inside[:, keys - tokens :]
        agrees = ((expected == allowed) | padding[..., None]).all()
    return torch.stack([start, end], 1) if bool(agrees) else None


def keys_seen(mask: Tensor) -> tuple[Tensor | None, Tensor]:
    """What each query sees, bool `[1 or batch, queries, keys]` where a mask says so, and what any of them sees."""
    if mask.dim() == 2:
        return None, mask.bool()
    allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
    return allowed, allowed.any(1)

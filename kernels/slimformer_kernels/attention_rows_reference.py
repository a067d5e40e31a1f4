"""Attention of selected queries in plain PyTorch: what runs without Triton, and what the kernel is tested against."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The reference holds at most this many scores at a time: 256 MiB in float32.
_REFERENCE_SCORES = 2**26
# Queries per call of the reference where a mask is needed: later ones see more keys than earlier ones.
_REFERENCE_QUERIES = 256


def attention_rows_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    query_offsets: Tensor,
    key_ranges: Tensor,
    longest: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """``attention_rows`` in plain PyTorch: runs without Triton, and the kernel is tested against it.

    It reads offsets and ranges on the host; under ``torch.compile`` one masked product stands in for that. On a GPU
    sequences of different lengths are padded, as far as memory goes.
    """
    batch = key_ranges.shape[0]
    counts = query_offsets.diff()
    # Which keys a query sees is one range: all of the rules are bounds on the key's position.
    ranges = key_ranges.repeat_interleave(counts, 0, output_size=query.shape[0]).long()
    low, high = _seen(positions.long(), ranges[:, 0], ranges[:, 1], causal, window)
    if torch.compiler.is_compiling():
        return _in_one_graph(query, key, value, counts, low, high, scale, softcap)
    if query.shape[0] == 0:
        return query.contiguous()
    lengths = counts.tolist()
    if key.shape[0] == batch and min(lengths) == max(lengths):
        # Sequences of one length, as without selection and in decoding, go together.
        shape = (batch, lengths[0])
        out = _attend(
            query.unflatten(0, shape), key, value, low.view(shape), high.view(shape), scale, softcap
        )
        return out.flatten(0, 1)
    if query.is_cuda:
        longest_range = int(key_ranges.diff(dim=1).max())
        if batch * max(lengths) * query.shape[1] * longest_range <= _REFERENCE_SCORES:
            numbers = (counts, max(lengths), longest_range)
            return _padded(query, key, value, key_ranges, low, high, *numbers, scale, softcap)
    outs, start = [], 0
    for b, length in enumerate(lengths):
        if length:
            own, home = slice(start, start + length), 0 if key.shape[0] == 1 else b
            parts = (query[None, own], key[home, None], value[home, None], low[None, own], high[None, own])
            outs.append(_attend(*parts, scale, softcap)[0])
        start += length
    return torch.cat(outs)


def _seen(
    positions: Tensor, start: Tensor, end: Tensor, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """The range of keys that each query sees: from the first tensor up to, without, the second."""
    low, high = start, end
    if causal:
        high = torch.minimum(high, positions + 1)
    elif window is not None:
        high = torch.minimum(high, positions + window + 1)
    if window is not None:
        low = torch.maximum(low, positions - window + (1 if causal else 0))
    return low, torch.maximum(high, low)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, low: Tensor, high: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """Attention of ``[batch, m, heads, head_dim]`` queries over the keys from ``low`` to ``high [batch, m]``."""
    batch, count, heads, _ = query.shape
    first, last = int(low.min()), int(high.max())
    same = int(low.max()) == first and softcap is None and last > first
    if same and int(high.min()) == last:
        return _weighted(query, key[:, first:last], value[:, first:last], None, False, scale, None)
    own = torch.arange(first + 1, first + count + 1, device=high.device)
    if same and last == first + count and bool((high == own).all()):
        return _weighted(query, key[:, first:last], value[:, first:last], None, True, scale, None)
    step = max(1, min(_REFERENCE_QUERIES, _REFERENCE_SCORES // (batch * heads * max(last - first, 1))))
    outs = []
    for part, lower, upper in zip(query.split(step, 1), low.split(step, 1), high.split(step, 1), strict=True):
        first, last = int(lower.min()), int(upper.max())
        keys = torch.arange(first, last, device=query.device)
        mask = (keys >= lower[..., None]) & (keys < upper[..., None])
        outs.append(_weighted(part, key[:, first:last], value[:, first:last], mask, False, scale, softcap))
    return torch.cat(outs, dim=1)


def _padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ranges: Tensor,
    low: Tensor,
    high: Tensor,
    counts: Tensor,
    most_queries: int,
    most_keys: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """All sequences in one call, padded: a GPU computes padding sooner than it launches a call per sequence."""
    batch, (start, end) = key_ranges.shape[0], key_ranges.long().split(1, dim=1)
    sequences = torch.arange(batch, device=query.device)
    owner = sequences.repeat_interleave(counts, output_size=query.shape[0])
    first = counts.cumsum(0) - counts
    place = torch.arange(query.shape[0], device=query.device) - first[owner]
    rows = torch.arange(most_queries, device=query.device) + first[:, None]
    rows = rows.clamp_max(query.shape[0] - 1)
    keys = torch.arange(most_keys, device=query.device)
    # Only keys of the sequence itself: what lies outside may hold anything.
    places = torch.minimum(start + keys, end - 1).clamp(0, key.shape[1] - 1)
    if key.shape[0] > 1:
        places = places + key.shape[1] * sequences[:, None]
    # Gathered by index_select, whose gradient is a plain sum; that of an index is sorted first.
    queries = query.index_select(0, rows.flatten()).unflatten(0, rows.shape)
    key, value = (
        t.flatten(0, 1).index_select(0, places.flatten()).unflatten(0, places.shape) for t in (key, value)
    )
    lower, upper = (bound[rows] - start for bound in (low, high))
    mask = (keys >= lower[..., None]) & (keys < upper[..., None])
    return _weighted(queries, key, value, mask, False, scale, softcap)[owner, place]


def _weighted(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """``[batch, m, heads, head_dim]`` queries over ``[batch, n, kv_heads, head_dim]`` keys.

    ``mask [batch, m, n]`` is True where a query sees a key.
    """
    query, key, value = (t.transpose(1, 2) for t in (query, key, value))
    blind = None
    if mask is not None:
        # A row without any key would be 0 / 0: let it see all, and take zeros instead of what it saw.
        blind = ~mask.any(-1, keepdim=True)
        mask, blind = (mask | blind)[:, None], blind[:, None]
    if softcap is None:
        # A branch: while tracing, head counts may be symbols, whose comparison is no bool to SDPA.
        grouped = {"enable_gqa": True} if query.shape[1] != key.shape[1] else {}
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal, scale=scale, **grouped
        )
    else:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        compute = torch.promote_types(query.dtype, torch.float32)
        scores = softcap * torch.tanh((query @ key.mT).to(compute) * (scale / softcap))
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        out = scores.softmax(-1).to(value.dtype) @ value
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2)


def _in_one_graph(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Tensor,
    low: Tensor,
    high: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The reference without reading a value on the host: every query meets the keys of every sequence."""
    keys = torch.arange(key.shape[1], device=query.device)
    mask = ((keys >= low[:, None]) & (keys < high[:, None]))[None]
    if key.shape[0] > 1:
        sequences = torch.arange(key.shape[0], device=query.device)
        owner = sequences.repeat_interleave(counts, output_size=query.shape[0])
        mask = mask & (owner == sequences[:, None])[..., None]
    queries = query.expand(key.shape[0], *query.shape)
    # A query is blind, hence zero, in all sequences but its own.
    return _weighted(queries, key, value, mask, False, scale, softcap).sum(0)

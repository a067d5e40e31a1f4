"""Attention to texts longer than the model was trained for: far keys at grouped positions (arXiv 2401.01325)."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import check_device, check_floating, check_positive
from .attention_rows import check_rows
from .errors import KernelArgumentError
from .rotary import rotary_reference

# The reference holds at most this many scores at a time: 64 MiB in float32.
_REFERENCE_SCORES = 2**24


def self_extend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inv_freq: Tensor,
    *,
    positions: Tensor,
    query_offsets: Tensor,
    key_ranges: Tensor,
    longest: int,
    causal: bool,
    scale: float,
    group: int,
    window: int,
    trained: int = 0,
    softcap: float | None = None,
    interleaved: bool = False,
) -> Tensor:
    """Attention whose relative positions never exceed what the model knows (SelfExtend, arXiv 2401.01325).

    With m the place of a query in its text and n that of a key, both counted from the start of the sequence's range,
    the score is that of the relative position

    - ``m - n`` where ``|m - n| < window``,
    - ``m // group - n // group + (window - window // group)`` where the key lies further back,
    - ``m // group - n // group - (window - window // group)`` where it lies further ahead (bidirectional).

    Queries and keys come rotated to their own places (RoPE) and are turned further from there, so that a cache
    holds what it always holds. Texts of up to ``trained`` tokens are attended to as usual: in a decoder every
    query at a place below ``trained``, in an encoder every query of a text that has no more tokens than that.

    Args:
        query: ``[queries, heads, head_dim]``, as for ``attention_rows``.
        key: ``[batch or 1, keys, kv_heads, head_dim]``, likewise.
        value: the same shape and dtype as ``key``.
        inv_freq: ``[rotary_dim / 2]`` float32, the angle by which each pair of channels turns per position.
        positions: ``[queries]``, the index of each query's own token along dimension 1 of ``key``.
        query_offsets: ``[batch + 1]``.
        key_ranges: ``[batch, 2]``; every text lies in one piece between its two ends.
        longest: upper bound on the number of queries of one sequence.
        causal: whether a query sees only the keys up to its own position.
        scale: factor on the products, positive.
        group: tokens that share a position when they are far away, at least 1.
        window: distance from which on they do, at least 1.
        trained: the length up to which nothing changes.
        softcap: cap on the scaled products; None for none.
        interleaved: whether rotation pairs neighbouring channels, rather than the two halves.

    Returns:
        ``[queries, heads, head_dim]`` in ``query.dtype``, contiguous. A query that sees no key gets zeros.

    Raises:
        KernelArgumentError: a shape, dtype, device, stride or number does not fit.

    Example:
        >>> places, query = torch.arange(10), torch.zeros(1, 1, 2)
        >>> key = torch.zeros(1, 10, 1, 2)
        >>> value = torch.arange(20.0).view(1, 10, 1, 2)
        >>> self_extend(query, key, value, torch.ones(1), positions=torch.tensor([9]), longest=1,
        ...             query_offsets=torch.tensor([0, 1]), key_ranges=torch.tensor([[0, 10]]),
        ...             causal=True, scale=1.0, group=2, window=4).flatten()
        tensor([ 9., 10.])
    """
    check_rows(query, key, value, positions, query_offsets, key_ranges, longest, causal)
    _check(query, inv_freq, group, window, trained)
    check_positive("scale", scale)
    if softcap is not None:
        check_positive("softcap", softcap)
    behind, ahead, key_far = turned_further(
        query, key, inv_freq, positions, query_offsets, key_ranges, group, window, causal, interleaved
    )
    rules = (positions, query_offsets, key_ranges, longest, causal, scale, window, trained, softcap)
    return self_extend_reference(query, key, value, behind, ahead, key_far, *rules)


def turned_further(
    query: Tensor,
    key: Tensor,
    inv_freq: Tensor,
    positions: Tensor,
    query_offsets: Tensor,
    key_ranges: Tensor,
    group: int,
    window: int,
    causal: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries for keys far behind, queries for keys far ahead, and those keys, each at grouped positions.

    A decoder has nothing ahead: the second is the first.
    """
    batch, starts = key_ranges.shape[0], key_ranges[:, 0].long().contiguous()
    own = starts.repeat_interleave(query_offsets.diff().long(), output_size=query.shape[0])
    place = positions.long() - own
    index = torch.arange(key.shape[1], device=key.device)
    if key.shape[0] == batch:
        key_place = (index - starts[:, None]).flatten()
    else:
        # Sequences behind each other: the last one that has started is the key's own.
        home = torch.searchsorted(starts, index, right=True).sub(1).clamp_min(0)
        key_place = index - starts[home]
    shift = window - window // group
    behind = _turned(query, place // group + shift - place, inv_freq, interleaved)
    ahead = behind if causal else _turned(query, place // group - shift - place, inv_freq, interleaved)
    keys = _turned(key.flatten(0, 1), key_place // group - key_place, inv_freq, interleaved)
    return behind, ahead, keys.view(key.shape)


def _turned(x: Tensor, by: Tensor, inv_freq: Tensor, interleaved: bool) -> Tensor:
    """``x [tokens, heads, head_dim]`` turned by a number of positions ``[tokens]``."""
    angle = by[:, None].to(inv_freq.dtype) * inv_freq
    angle = angle.repeat_interleave(2, 1) if interleaved else torch.cat((angle, angle), 1)
    return rotary_reference(x, angle.cos(), angle.sin(), None, interleaved)


def self_extend_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_behind: Tensor,
    query_ahead: Tensor,
    key_far: Tensor,
    positions: Tensor,
    query_offsets: Tensor,
    key_ranges: Tensor,
    longest: int,
    causal: bool,
    scale: float,
    window: int,
    trained: int,
    softcap: float | None,
) -> Tensor:
    """``self_extend`` of turned queries and keys in plain PyTorch: runs without Triton, and is what kernels must equal.

    Like the kernel it goes tile by tile: a product with near keys, one with far keys, and both only where some
    queries of the tile are near to a key and others are not. It reads offsets and ranges on the host.
    """
    outs, start = [], 0
    ranges = key_ranges.tolist()
    for b, count in enumerate(query_offsets.diff().tolist()):
        (first, end), home = ranges[b], 0 if key.shape[0] == 1 else b
        keys, far, values = (t[home, first:end].permute(1, 2, 0) for t in (key, key_far, value))
        extends = not causal and end - first > trained
        step = max(1, _REFERENCE_SCORES // (query.shape[1] * max(end - first, 1)))
        for begin in range(start, start + count, step):
            own = slice(begin, min(begin + step, start + count))
            place = positions[own].long() - first
            # Distances below are near; everything is where the model is left alone.
            extended = place >= trained if causal else torch.full_like(place, extends, dtype=torch.bool)
            reach = torch.where(extended, window, end - first + longest + window)
            tile = (query[own], query_behind[own], query_ahead[own])
            outs.append(_attend(*tile, keys, far, values, place, reach, causal, scale, softcap))
        start += count
    return torch.cat(outs) if outs else query.contiguous()


def _attend(
    query: Tensor,
    behind: Tensor,
    ahead: Tensor,
    keys: Tensor,
    far: Tensor,
    values: Tensor,
    place: Tensor,
    reach: Tensor,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Queries ``[m, heads, head_dim]`` over keys ``[kv_heads, head_dim, n]``, near ones closer than ``reach [m]``."""
    count, heads, width = query.shape
    kv_heads, n = keys.shape[0], keys.shape[2]
    group = heads // kv_heads

    compute = torch.promote_types(query.dtype, torch.float32)

    def product(q: Tensor, k: Tensor) -> Tensor:
        rows = q.view(count, kv_heads, group, width).permute(1, 2, 0, 3).reshape(kv_heads, -1, width)
        # Scaled where that is less work and costs no digits.
        return (rows * scale) @ k if q.dtype == compute else (rows @ k).to(compute) * scale

    last = min(n, int(place.max()) + 1) if causal else n
    if last <= 0:
        return torch.zeros_like(query)
    bounds = (place - reach).min(), (place - reach).max(), (place + reach).min(), (place + reach).max()
    # From the first on a key may be near, up to the second it may be far behind; and the same ahead.
    near_from, behind_to, ahead_from, near_to = (
        min(max(int(bound), 0), last) for bound in (bounds[0] + 1, bounds[1] + 1, bounds[2], bounds[3])
    )
    near_from = min(near_from, behind_to)
    if causal:
        near_to = ahead_from = last
    near_to = max(near_to, near_from, ahead_from)
    index = torch.arange(last, device=query.device)
    row_place, row_reach = place.repeat(group)[:, None], reach.repeat(group)[:, None]
    scores = torch.cat(
        [
            product(behind, far[..., :near_from]),
            product(query, keys[..., near_from:near_to]),
            product(ahead, far[..., near_to:last]),
        ],
        dim=2,
    )
    if behind_to > near_from:
        both = slice(near_from, behind_to)
        is_far = index[both] <= row_place - row_reach
        mixed = torch.where(is_far, product(behind, far[..., both]), scores[..., both])
        scores = torch.cat([scores[..., :near_from], mixed, scores[..., behind_to:]], dim=2)
    if near_to > ahead_from:
        both = slice(ahead_from, near_to)
        is_far = index[both] >= row_place + row_reach
        mixed = torch.where(is_far, product(ahead, far[..., both]), scores[..., both])
        scores = torch.cat([scores[..., :ahead_from], mixed, scores[..., near_to:]], dim=2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    lowest = int(place.min())
    if causal:
        unseen = slice(max(lowest + 1, 0), last)
        scores[..., unseen].masked_fill_(index[unseen] > row_place, -math.inf)
    weights = scores.softmax(-1)
    if causal and lowest < 0:
        # A query in front of its text sees nothing.
        weights = weights.nan_to_num(0.0)
    out = weights.to(values.dtype) @ values[..., :last].mT
    return out.view(kv_heads, group, count, width).permute(2, 0, 1, 3).reshape(count, heads, width)


def _check(query: Tensor, inv_freq: Tensor, group: int, window: int, trained: int) -> None:
    check_floating("inv_freq", inv_freq)
    check_device("inv_freq", inv_freq, query, "query")
    check_positive("group", group)
    check_positive("window", window)
    if trained < 0:
        raise KernelArgumentError.of(
            "trained must not be negative",
            got=trained,
            allowed="the number of tokens up to which nothing changes, 0 for none",
            remedy="pass the length that the model was trained for",
        )
    if inv_freq.dim() != 1 or not 0 < 2 * inv_freq.shape[0] <= query.shape[2]:
        raise KernelArgumentError.of(
            "inv_freq does not fit query",
            got=f"shape {tuple(inv_freq.shape)}",
            allowed=f"[rotary_dim / 2], rotary_dim at most {query.shape[2]}",
            remedy="pass the inv_freq of the model's rotary embedding",
        )

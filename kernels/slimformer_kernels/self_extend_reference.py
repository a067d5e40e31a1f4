"""SelfExtend in plain PyTorch: queries and keys turned to grouped positions, and what the kernel is tested against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .dispatch import KERNEL_DTYPES, runs_kernel
from .rotary import rotary_op, rotary_reference

# The reference holds at most this many scores at a time: 16 MiB in float32, which a CPU keeps near.
_REFERENCE_SCORES = 2**22
# And so many queries, since later ones see more keys, and the more there are the more tiles hold near and far keys.
_REFERENCE_QUERIES = 128


def far_turns(
    inv_freq: Tensor, group: int, places: int, interleaved: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """By how much the key at each place is turned from its own position to that of its group.

    Args:
        inv_freq: As for ``self_extend``.
        group: Likewise.
        places: For how many places.
        interleaved: As for ``self_extend``.
        dtype: Of the result; None for that of ``inv_freq``.

    Returns:
        Cosines and sines ``[places, rotary_dim]``.
    """
    place = torch.arange(places, device=inv_freq.device)
    cos, sin = _angles(place // group - place, inv_freq, interleaved)
    return cos.to(dtype or inv_freq.dtype), sin.to(dtype or inv_freq.dtype)


def turned_further(
    query: Tensor,
    key: Tensor,
    inv_freq: Tensor,
    turns: tuple[Tensor, Tensor],
    positions: Tensor,
    query_offsets: Tensor,
    key_ranges: Tensor,
    group: int,
    window: int,
    causal: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries for keys far behind, queries for keys far ahead, and those keys, each at grouped positions.

    A decoder has nothing ahead: the second is the first. ``turns`` is what ``far_turns`` gives.
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
    behind = _turned(
        query, *_angles(place // group + shift - place, inv_freq, interleaved), None, interleaved
    )
    ahead = behind
    if not causal:
        angles = _angles(place // group - shift - place, inv_freq, interleaved)
        ahead = _turned(query, *angles, None, interleaved)
    # Nobody sees a key in front of its text.
    keys = _turned(key.flatten(0, 1), *turns, key_place.clamp_min(0), interleaved)
    return behind, ahead, keys.view(key.shape)


def _angles(by: Tensor, inv_freq: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[tokens, rotary_dim]`` of turns by a number of positions ``[tokens]``."""
    angle = by[:, None].to(inv_freq.dtype) * inv_freq
    angle = angle.repeat_interleave(2, 1) if interleaved else torch.cat((angle, angle), 1)
    return angle.cos(), angle.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, interleaved: bool) -> Tensor:
    """``x [tokens, heads, head_dim]`` turned by cosines and sines, those of ``rows`` where they are not in order."""
    if runs_kernel(x) and cos.dtype in KERNEL_DTYPES:
        turned = x.clone(memory_format=torch.contiguous_format)
        rotary_op(turned, None, cos, sin, rows, interleaved)
        return turned
    return rotary_reference(x, cos, sin, rows, interleaved)


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
        step = _REFERENCE_SCORES // (query.shape[1] * max(end - first, 1))
        step = min(max(step, 1), _REFERENCE_QUERIES)
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

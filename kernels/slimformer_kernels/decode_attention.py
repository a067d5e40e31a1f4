"""Attention of the newest queries of every text over its cached keys, as many as the device says (flash decoding)."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention_blocks import WIDEST_HEAD, block_width
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .errors import KernelArgumentError
from .merge_parts import merge_rows

# Programs per multiprocessor: each waits for memory most of the time.
_PROGRAMS_EACH = 2
_BLOCK_KEYS, _WARPS, _STAGES = 64, 4, 3
# The time of a tile over that of merging a part: an estimate, from steps behind 512, 4096 and 16384 tokens on an H200.
_TILE_PER_PART = 3.6
# Queries times query heads per key head that one tile of products holds.
_MOST_ROWS = 64
# Without a GPU, so that the interpreter has several parts to merge.
_FEW_PROCESSORS = 6


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ranges: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """Softmax attention of the newest token of every text, or of its newest few, each of which sees those before.

    Only keys in a text's range are read, so that a cache may have any amount of room behind them; and since the range
    lies on the device, one CUDA graph serves every length.

    Args:
        query: ``[batch * tokens, heads, head_dim]``, those of the last keys in each range.
        key: ``[batch, places, kv_heads, head_dim]``, any strides, last dimension contiguous.
        value: The same.
        key_ranges: ``[batch, 2]`` int64, the first place of each text's keys, and the one behind its last.
        scale: What scores are multiplied by.
        window: How many keys are seen, the newest; None for all.
        softcap: Scores become ``softcap * tanh(scores / softcap)``; None for as they are.
        counters: int32 zeros, one at least for every text and key head, which are zeros again behind the call; None to
            make them.

    Returns:
        ``[batch * tokens, heads, head_dim]``; zeros where a query sees no key.

    Raises:
        KernelArgumentError: the shapes do not fit each other.

    Example:
        >>> keys = torch.tensor([[[[0.0]], [[0.0]], [[9.0]]]])
        >>> values = torch.tensor([[[[1.0]], [[3.0]], [[7.0]]]])
        >>> decode_attention(torch.ones(1, 1, 1), keys, values, torch.tensor([[0, 2]]), scale=1.0)
        tensor([[[2.]]])
    """
    rows, heads, width = query.shape
    fits = key.shape == value.shape and key.dim() == 4 and key.shape[3] == width and rows % len(key) == 0
    if not fits or heads % key.shape[2] or tuple(key_ranges.shape) != (len(key), 2):
        raise KernelArgumentError.of(
            "queries, keys and values do not fit each other",
            got=f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}, ranges {tuple(key_ranges.shape)}",
            allowed="[batch * tokens, heads, head_dim], twice [batch, places, kv_heads, head_dim], [batch, 2]",
            remedy="Pass as many queries for every text, and keys as they lie in its cache.",
        )
    if runs_kernel(query, key, value) and width <= WIDEST_HEAD:
        return decode_attention_op(query, key, value, key_ranges, scale, window, softcap, counters)
    return decode_attention_reference(query, key, value, key_ranges, scale, window, softcap)


def decode_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ranges: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """``decode_attention`` in plain PyTorch. Runs without Triton; the kernel is tested against it."""
    (rows, _, width), (batch, places, kv_heads, _) = query.shape, key.shape
    tokens = rows // batch
    grouped = query.view(batch, tokens, kv_heads, -1, width).float()
    scores = torch.einsum("btkgd,bpkd->btkgp", grouped, key.float()) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    place = torch.arange(places, device=key.device)
    start = key_ranges[:, :1, None]
    # Behind the key of each query.
    end = key_ranges[:, 1:, None] - torch.arange(tokens - 1, -1, -1, device=key.device)[:, None]
    if window is not None:
        start = torch.maximum(start, end - window)
    seen = (place >= start) & (place < end)
    weights = scores.masked_fill(~seen[:, :, None, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    # Room behind the keys may hold anything.
    values = value.float().masked_fill(~seen.any(1)[..., None, None], 0.0)
    return torch.einsum("btkgp,bpkd->btkgd", weights, values).reshape(query.shape).to(query.dtype)


@kernel_op("decode_attention", mutates=("counters",))
def decode_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_ranges: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    counters: Tensor | None,
) -> Tensor:
    """Launch the kernel; the arguments have been checked.

    Keys are split among programs, and all query heads of a key head share one tile. The last program of a head to be
    done merges what the others found.
    """
    heads, width = int(query.shape[1]), int(query.shape[2])
    batch, kv_heads = key.shape[0], int(key.shape[2])
    tokens, groups = query.shape[0] // batch, heads // kv_heads
    most = max(_MOST_ROWS // groups, 1)
    if tokens > most:
        return _by_parts(query, key, value, key_ranges, scale, window, softcap, counters, most)
    rows = max(16, 1 << (tokens * groups - 1).bit_length())
    splits = _splits(query, batch * kv_heads, int(key.shape[1]))
    parts = query.new_empty(batch * kv_heads * splits * rows * (width + 2), dtype=torch.float32)
    if counters is None or counters.numel() < batch * kv_heads:
        counters = query.new_zeros(batch * kv_heads, dtype=torch.int32)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    with torch.cuda.device_of(query):
        # fmt: off
        wrap_triton(_decode_kernel)[(splits, kv_heads, batch)](
            query, key, value, key_ranges.contiguous(), parts, counters, out,
            width, tokens,
            query.stride(0), query.stride(1),
            key.stride(0), key.stride(1), key.stride(2),
            value.stride(0), value.stride(1), value.stride(2),
            0 if window is None else window,
            0.0 if softcap is None else scale / softcap,
            # exp2 in the kernel: log2(e) goes into the factor.
            (scale if softcap is None else softcap) * math.log2(math.e),
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            SEVERAL=tokens > 1,
            GROUP=groups,
            SPLITS=splits,
            STAGES=_STAGES,
            BLOCK_ROWS=rows,
            BLOCK_KEYS=_BLOCK_KEYS if width <= 128 else _BLOCK_KEYS // 2,
            BLOCK_WIDTH=block_width(width),
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
        # fmt: on
    return out


def _by_parts(query, key, value, key_ranges, scale, window, softcap, counters, most):
    """``decode_attention_op`` of at most so many tokens at a time."""
    by_text = query.view(key.shape[0], -1, *query.shape[1:])
    found, tokens = [], by_text.shape[1]
    for first in range(0, tokens, most):
        part = by_text[:, first : first + most]
        ranges = key_ranges.clone()
        ranges[:, 1] -= tokens - first - part.shape[1]
        given = part.flatten(0, 1), key, value, ranges, scale, window, softcap, counters
        found.append(decode_attention_op(*given).view(part.shape))
    return torch.cat(found, 1).view(query.shape)


def _splits(query: Tensor, programs: int, keys: int) -> int:
    """Into how many parts keys are split: all of a GPU has something to read, and merging takes no longer than that."""
    if query.is_cuda:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    else:
        processors = _FEW_PROCESSORS
    wanted, tiles = -(-_PROGRAMS_EACH * processors // programs), -(-keys // _BLOCK_KEYS)
    return max(min(wanted, tiles, math.ceil(math.sqrt(_TILE_PER_PART * tiles))), 1)


# fmt: off
@jit
def _decode_kernel(
    query_ptr, key_ptr, value_ptr, ranges_ptr, parts_ptr, done_ptr, out_ptr,
    width, tokens,
    query_stride_batch, query_stride_head,
    key_stride_batch, key_stride_token, key_stride_head,
    value_stride_batch, value_stride_token, value_stride_head,
    window, tanh_scale, log2_scale,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SEVERAL: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # fmt: on
    # torch.compile passes numbers as float64, which would spread to every product.
    tanh_scale, log2_scale = tl.cast(tanh_scale, tl.float32), tl.cast(log2_scale, tl.float32)
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    start = tl.load(ranges_ptr + 2 * batch).to(tl.int64)
    end = tl.load(ranges_ptr + 2 * batch + 1).to(tl.int64)
    if HAS_WINDOW:
        start = tl.maximum(start, end - (tokens - 1) - window)
    length = tl.maximum(end - start, 0).to(tl.int32)
    rows = tl.arange(0, BLOCK_ROWS)
    valid = rows < tokens * GROUP
    row_of = tl.minimum(rows, tokens * GROUP - 1)
    query_at = batch * tokens + row_of // GROUP
    head = kv_head * GROUP + row_of % GROUP
    # How many of the keys each query sees, and from which on.
    seen = length - (tokens - 1 - row_of // GROUP)
    columns = tl.arange(0, BLOCK_WIDTH)
    inside = (columns < width)[None, :]
    query_row = query_ptr + (query_at * query_stride_batch + head * query_stride_head)[:, None]
    query = tl.load(query_row + columns[None, :], mask=inside, other=0.0)

    # This program's share of whole tiles.
    tiles = (length + BLOCK_KEYS - 1) // BLOCK_KEYS
    share = (tiles + SPLITS - 1) // SPLITS * BLOCK_KEYS
    first = tl.minimum(split * share, length)
    last = tl.minimum(first + share, length)
    key_head = key_ptr + batch * key_stride_batch + kv_head * key_stride_head + start * key_stride_token
    value_head = value_ptr + batch * value_stride_batch + kv_head * value_stride_head
    value_head += start * value_stride_token
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    weight = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    peak = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
    for tile in tl.range(first, last, BLOCK_KEYS, num_stages=STAGES):
        index = tile + tl.arange(0, BLOCK_KEYS)
        here = (index < last)[:, None] & inside
        # int64: keys x kv_heads x head_dim passes 2**31 at 512k tokens of 4096.
        row = index.to(tl.int64)[:, None]
        key = tl.load(key_head + row * key_stride_token + columns[None, :], mask=here, other=0.0)
        # "ieee": TF32 would cost float32 inputs half their digits; half precision ignores it.
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_SOFTCAP:
            # tanh(u) = 1 - 2 / (1 + exp(2u)), with 2 * log2(e) = 2.8853900817779268.
            scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (tanh_scale * 2.8853900817779268)))
        there = (index < last)[None, :]
        if SEVERAL:
            there = there & (index[None, :] < seen[:, None])
            if HAS_WINDOW:
                there = there & (index[None, :] >= seen[:, None] - window)
        scores = tl.where(there, scores * log2_scale, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        base = new_peak
        if SEVERAL:
            # One query's tile holds a key at least; of several, some may see none of it.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        weight = weight * fade + tl.sum(weights, axis=1)
        value = tl.load(value_head + row * value_stride_token + columns[None, :], mask=here, other=0.0)
        total = tl.dot(weights.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
        peak = new_peak

    # Rows of all parts of this head; behind those of all heads lie the sums of weights, then the greatest scores.
    own = (batch * tl.num_programs(1) + kv_head) * SPLITS * BLOCK_ROWS
    all_rows = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * SPLITS * BLOCK_ROWS
    sums_ptr = parts_ptr + all_rows * width
    part = own + split * BLOCK_ROWS + rows
    tl.store(
        parts_ptr + (part * width)[:, None] + columns[None, :], total, mask=valid[:, None] & inside
    )
    tl.store(sums_ptr + part, weight, mask=valid)
    tl.store(sums_ptr + all_rows + part, peak, mask=valid)
    # All threads have stored before the first one says so.
    tl.debug_barrier()
    done = tl.atomic_add(done_ptr + batch * tl.num_programs(1) + kv_head, 1, sem="acq_rel")
    if done == SPLITS - 1:
        out_row = query_at * (tl.num_programs(1) * GROUP) + head
        # For the next call.
        tl.store(done_ptr + batch * tl.num_programs(1) + kv_head, 0)
        merge_rows(
            parts_ptr, all_rows, own + rows, valid, out_ptr, out_row, width, SPLITS, BLOCK_ROWS, BLOCK_WIDTH
        )

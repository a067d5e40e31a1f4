"""SelfExtend for a few new queries behind many cached keys, which are read once, as they lie in the cache."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
from torch import Tensor

from .attention_blocks import block_width
from .dispatch import jit, kernel_op, tl, wrap_triton
from .merge_parts import merge_kernel, merge_rows

# Queries times query heads per key head that one tile of products holds.
MOST_ROWS = 64
# As many of them are merged by the last program of a head; more are merged in parallel, by a second launch.
_MERGED_AT_ONCE = 16
# Programs per multiprocessor: each waits for memory most of the time.
_PROGRAMS_EACH = 2
_BLOCK_KEYS, _WARPS, _STAGES = 64, 4, 2
# Without a GPU, so that the interpreter has several parts to merge.
_FEW_PROCESSORS = 12


def decodes(query: Tensor, key: Tensor, longest: int, causal: bool) -> bool:
    """Whether this call is one for `self_extend_decode_op`."""
    return causal and longest * (query.shape[1] // key.shape[2]) <= MOST_ROWS


@kernel_op("self_extend_decode")
def self_extend_decode_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    inv_freq: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    query_offsets: Tensor,
    key_ranges: Tensor,
    longest: int,
    scale: float,
    group: int,
    window: int,
    trained: int,
    softcap: float | None,
    interleaved: bool,
) -> Tensor:
    """Launch the kernels; the arguments have been checked.

    Far keys are turned where they are multiplied, by the cosines and sines ``[places, rotary_dim]`` of
    ``far_turns``, so that no key is read twice and nothing but the model's own cache has to be kept. Keys are
    split among programs (flash decoding), and all query heads of a key head share one tile.
    """
    heads, width, kv_heads = int(query.shape[1]), int(query.shape[2]), int(key.shape[2])
    batch, groups, half = int(key_ranges.shape[0]), heads // kv_heads, int(inv_freq.shape[0])
    rows = max(16, 1 << (max(longest * groups, 1) - 1).bit_length())
    splits = _splits(query, batch * kv_heads, int(key.shape[1]))
    # Weighted sums of values, [batch, kv_heads, splits, rows, width]; then sums of weights, and greatest scores.
    parts = query.new_empty(batch * kv_heads * splits * rows * (width + 2), dtype=torch.float32)
    merges = rows <= _MERGED_AT_ONCE
    # How many programs of each key head are done; the one that finds all others done merges.
    done = query.new_zeros(batch * kv_heads, dtype=torch.int32)
    out = query.new_empty(query.shape)
    packed = key.shape[0] == 1
    with torch.cuda.device_of(query):
        # fmt: off
        wrap_triton(_decode_kernel)[(splits, kv_heads, batch)](
            query, key, value, inv_freq.contiguous(), cos, sin,
            positions.contiguous(), query_offsets.contiguous(), key_ranges.contiguous(), parts, done, out,
            width, half,
            query.stride(0), query.stride(1),
            0 if packed else key.stride(0), key.stride(1), key.stride(2),
            0 if packed else value.stride(0), value.stride(1), value.stride(2),
            cos.stride(0), sin.stride(0),
            group, window, trained,
            0.0 if softcap is None else scale / softcap,
            # exp2 in the kernel: log2(e) goes into the factor.
            (scale if softcap is None else softcap) * math.log2(math.e),
            HAS_SOFTCAP=softcap is not None,
            INTERLEAVED=interleaved,
            HAS_REST=2 * half < width,
            MERGES=merges,
            GROUP=groups,
            SPLITS=splits,
            STAGES=_STAGES,
            BLOCK_ROWS=rows,
            BLOCK_KEYS=_BLOCK_KEYS,
            BLOCK_HALF=block_width(half),
            BLOCK_REST=block_width(max(width - 2 * half, 1)),
            BLOCK_WIDTH=block_width(width),
            num_warps=_WARPS,
            num_stages=_STAGES,
        )
        if not merges:
            # One program to spare: an empty launch needs no branch on the number of queries.
            wrap_triton(merge_kernel)[(longest + 1, heads, batch)](
                parts, query_offsets.contiguous(), out,
                width,
                HEADS=heads,
                GROUP=groups,
                SPLITS=splits,
                ROWS=rows,
                BLOCK_SPLITS=1 << (splits - 1).bit_length(),
                BLOCK_WIDTH=block_width(width),
                num_warps=4,
            )
        # fmt: on
    return out


def _splits(query: Tensor, programs: int, keys: int) -> int:
    """Into how many parts keys are split, so that all of a GPU has something to read."""
    if query.is_cuda:
        processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    else:
        processors = _FEW_PROCESSORS
    wanted = -(-_PROGRAMS_EACH * processors // programs)
    return max(min(wanted, -(-keys // _BLOCK_KEYS)), 1)


# fmt: off
@jit
def _decode_kernel(
    query_ptr, key_ptr, value_ptr, inv_freq_ptr, cos_ptr, sin_ptr, positions_ptr, offsets_ptr, ranges_ptr,
    parts_ptr, done_ptr, out_ptr,
    width, half,
    query_stride_token, query_stride_head,
    key_stride_batch, key_stride_token, key_stride_head,
    value_stride_batch, value_stride_token, value_stride_head,
    cos_stride, sin_stride,
    group, window, trained, tanh_scale, log2_scale,
    HAS_SOFTCAP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_REST: tl.constexpr,
    MERGES: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # fmt: on
    # torch.compile passes numbers as float64, which would spread to every product.
    tanh_scale, log2_scale = tl.cast(tanh_scale, tl.float32), tl.cast(log2_scale, tl.float32)
    split = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    begin = tl.load(offsets_ptr + batch).to(tl.int64)
    count = (tl.load(offsets_ptr + batch + 1).to(tl.int64) - begin).to(tl.int32)
    if count > 0:
        # Row r is query r // GROUP of head r % GROUP; beyond the last the last is repeated.
        rows = tl.arange(0, BLOCK_ROWS)
        token = begin + tl.minimum(rows // GROUP, count - 1)
        head = kv_head * GROUP + rows % GROUP
        start = tl.load(ranges_ptr + 2 * batch).to(tl.int64)
        end = tl.load(ranges_ptr + 2 * batch + 1).to(tl.int64)
        length = tl.maximum(end - start, 0).to(tl.int32)
        place = (tl.load(positions_ptr + token).to(tl.int64) - start).to(tl.int32)

        # Rotated pairs lie side by side, or in two halves; behind them is what is not rotated.
        columns = tl.arange(0, BLOCK_HALF)
        first, step = columns, half
        if INTERLEAVED:
            first, step = 2 * columns, 1
        inside = (columns < half)[None, :]
        query_row = query_ptr + (token * query_stride_token + head * query_stride_head)[:, None]
        low = tl.load(query_row + first[None, :], mask=inside, other=0.0)
        high = tl.load(query_row + first[None, :] + step, mask=inside, other=0.0)
        rest_columns = tl.arange(0, BLOCK_REST)
        rest_inside = (2 * half + rest_columns < width)[None, :]
        rest = low
        if HAS_REST:
            rest = tl.load(query_row + 2 * half + rest_columns[None, :], mask=rest_inside, other=0.0)
        # To the grouped place of a query behind which keys are far.
        turn = (place // group + window - window // group - place).to(tl.float32)
        inv_freq = tl.load(inv_freq_ptr + columns, mask=columns < half, other=0.0)
        angle = turn[:, None] * inv_freq.to(tl.float32)[None, :]
        cos, sin = tl.cos(angle), tl.sin(angle)
        far_low = (low.to(tl.float32) * cos - high.to(tl.float32) * sin).to(low.dtype)
        far_high = (high.to(tl.float32) * cos + low.to(tl.float32) * sin).to(low.dtype)

        # Where the model is left alone, every key is near.
        near_from = place + 1 - tl.where(place >= trained, window, 1 << 29)
        seen_to = tl.minimum(place + 1, length)
        last = tl.maximum(tl.max(seen_to, axis=0), 0)
        # Whole tiles: [0, far) far for all, [far, near) near for some, [near, seen) near for all and seen by all.
        far = tl.minimum(tl.maximum(tl.min(near_from, axis=0), 0), last) // BLOCK_KEYS * BLOCK_KEYS
        near = tl.minimum(tl.maximum(tl.max(near_from, axis=0), 0), last)
        near = (near + BLOCK_KEYS - 1) // BLOCK_KEYS * BLOCK_KEYS
        seen = tl.minimum(tl.maximum(tl.min(seen_to, axis=0), 0), last) // BLOCK_KEYS * BLOCK_KEYS
        seen = tl.maximum(seen, near)
        # This program's share of them.
        tiles = (last + BLOCK_KEYS - 1) // BLOCK_KEYS
        share = (tiles + SPLITS - 1) // SPLITS * BLOCK_KEYS
        own_first = tl.minimum(split * share, last)
        own_last = tl.minimum(own_first + share, last)

        key_head = key_ptr + batch * key_stride_batch + kv_head * key_stride_head + start * key_stride_token
        value_head = value_ptr + batch * value_stride_batch + kv_head * value_stride_head
        value_head += start * value_stride_token
        total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
        weight = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
        peak = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
        # fmt: off
        total, weight, peak = _attend_tiles(
            total, weight, peak, low, high, far_low, far_high, rest, key_head, value_head, cos_ptr, sin_ptr,
            key_stride_token, value_stride_token, cos_stride, sin_stride, own_first, tl.minimum(own_last, far),
            near_from, seen_to, last, half, width, tanh_scale, log2_scale, False, True, False, HAS_SOFTCAP,
            INTERLEAVED, HAS_REST, STAGES, BLOCK_KEYS, BLOCK_HALF, BLOCK_REST, BLOCK_WIDTH,
        )
        total, weight, peak = _attend_tiles(
            total, weight, peak, low, high, far_low, far_high, rest, key_head, value_head, cos_ptr, sin_ptr,
            key_stride_token, value_stride_token, cos_stride, sin_stride, tl.maximum(own_first, far),
            tl.minimum(own_last, near), near_from, seen_to, last, half, width, tanh_scale, log2_scale, True, True,
            True, HAS_SOFTCAP, INTERLEAVED, HAS_REST, STAGES, BLOCK_KEYS, BLOCK_HALF, BLOCK_REST, BLOCK_WIDTH,
        )
        total, weight, peak = _attend_tiles(
            total, weight, peak, low, high, far_low, far_high, rest, key_head, value_head, cos_ptr, sin_ptr,
            key_stride_token, value_stride_token, cos_stride, sin_stride, tl.maximum(own_first, near),
            tl.minimum(own_last, seen), near_from, seen_to, last, half, width, tanh_scale, log2_scale, True, False,
            False, HAS_SOFTCAP, INTERLEAVED, HAS_REST, STAGES, BLOCK_KEYS, BLOCK_HALF, BLOCK_REST, BLOCK_WIDTH,
        )
        total, weight, peak = _attend_tiles(
            total, weight, peak, low, high, far_low, far_high, rest, key_head, value_head, cos_ptr, sin_ptr,
            key_stride_token, value_stride_token, cos_stride, sin_stride, tl.maximum(own_first, seen), own_last,
            near_from, seen_to, last, half, width, tanh_scale, log2_scale, True, False, True, HAS_SOFTCAP,
            INTERLEAVED, HAS_REST, STAGES, BLOCK_KEYS, BLOCK_HALF, BLOCK_REST, BLOCK_WIDTH,
        )
        # fmt: on
        # Rows of all parts of this head; behind those of all heads lie the sums of weights, then the greatest scores.
        own = (batch * tl.num_programs(1) + kv_head) * SPLITS * BLOCK_ROWS
        all_rows = tl.num_programs(2).to(tl.int64) * tl.num_programs(1) * SPLITS * BLOCK_ROWS
        sums_ptr = parts_ptr + all_rows * width
        part = own + split * BLOCK_ROWS + rows
        valid = rows < count * GROUP
        value_columns = tl.arange(0, BLOCK_WIDTH)
        target = parts_ptr + (part * width)[:, None] + value_columns[None, :]
        written = valid[:, None] & (value_columns < width)[None, :]
        tl.store(target, total, mask=written)
        tl.store(sums_ptr + part, weight, mask=valid)
        tl.store(sums_ptr + all_rows + part, peak, mask=valid)
        if MERGES:
            # All threads have stored before the first one says so.
            tl.debug_barrier()
            done = tl.atomic_add(done_ptr + batch * tl.num_programs(1) + kv_head, 1, sem="acq_rel")
            if done == SPLITS - 1:
                out_row = ((begin + rows // GROUP) * tl.num_programs(1) + kv_head) * GROUP + rows % GROUP
                merge_rows(
                    parts_ptr, all_rows, own + rows, valid, out_ptr, out_row, width, SPLITS, BLOCK_ROWS, BLOCK_WIDTH
                )


# fmt: off
@jit
def _attend_tiles(
    total, weight, peak, low, high, far_low, far_high, rest, key_head, value_head, cos_ptr, sin_ptr,
    key_stride, value_stride, cos_stride, sin_stride, first, last, near_from, seen_to, end, half, width,
    tanh_scale, log2_scale,
    NEAR: tl.constexpr,
    FAR: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HAS_REST: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # fmt: on
    """Online softmax over the keys from ``first`` to ``last``, which are near, far, or either for some query."""
    columns = tl.arange(0, BLOCK_HALF)
    lower, step = columns, half
    if INTERLEAVED:
        lower, step = 2 * columns, 1
    rest_columns = tl.arange(0, BLOCK_REST)
    value_columns = tl.arange(0, BLOCK_WIDTH)
    for tile in tl.range(first, last, BLOCK_KEYS, num_stages=STAGES):
        index = tile + tl.arange(0, BLOCK_KEYS)
        here = (index < end)[:, None]
        inside = here & (columns < half)[None, :]
        # int64: keys x kv_heads x head_dim passes 2**31 at 512k tokens of 4096.
        row = index.to(tl.int64)[:, None]
        key_row = key_head + row * key_stride
        key_low = tl.load(key_row + lower[None, :], mask=inside, other=0.0)
        key_high = tl.load(key_row + lower[None, :] + step, mask=inside, other=0.0)
        # "ieee": TF32 would cost float32 inputs half their digits; half precision ignores it.
        if FAR:
            cos = tl.load(cos_ptr + row * cos_stride + lower[None, :], mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + row * sin_stride + lower[None, :], mask=inside, other=0.0).to(tl.float32)
            turned_low = (key_low.to(tl.float32) * cos - key_high.to(tl.float32) * sin).to(key_low.dtype)
            turned_high = (key_high.to(tl.float32) * cos + key_low.to(tl.float32) * sin).to(key_low.dtype)
            scores = tl.dot(far_low, tl.trans(turned_low), input_precision="ieee")
            scores = tl.dot(far_high, tl.trans(turned_high), scores, input_precision="ieee")
        if NEAR:
            near = tl.dot(low, tl.trans(key_low), input_precision="ieee")
            near = tl.dot(high, tl.trans(key_high), near, input_precision="ieee")
            scores = tl.where(index[None, :] < near_from[:, None], scores, near) if FAR else near
        if HAS_REST:
            behind = tl.load(
                key_row + 2 * half + rest_columns[None, :],
                mask=here & (2 * half + rest_columns < width)[None, :],
                other=0.0,
            )
            scores = tl.dot(rest, tl.trans(behind), scores, input_precision="ieee")
        if HAS_SOFTCAP:
            # tanh(u) = 1 - 2 / (1 + exp(2u)), with 2 * log2(e) = 2.8853900817779268.
            scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (tanh_scale * 2.8853900817779268)))
        if MASKED:
            scores = tl.where(index[None, :] < seen_to[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * log2_scale)
        base = new_peak
        if MASKED:
            # Nothing seen yet: -inf minus -inf would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * log2_scale - base[:, None])
        fade = tl.exp2(peak - base)
        weight = weight * fade + tl.sum(weights, axis=1)
        value = tl.load(
            value_head + row * value_stride + value_columns[None, :],
            mask=here & (value_columns < width)[None, :],
            other=0.0,
        )
        total = tl.dot(weights.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
        peak = new_peak
    return total, weight, peak

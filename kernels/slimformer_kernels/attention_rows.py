"""Attention of selected queries over all keys, without ever holding the score matrix."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import check_positive
from .attention_blocks import WIDEST_HEAD, block_width, blocks_for
from .attention_rows_arguments import check_arguments
from .attention_rows_reference import attention_rows_reference
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton


def attention_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    positions: Tensor,
    query_offsets: Tensor,
    key_ranges: Tensor,
    longest: int,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of compact queries, any subset of each sequence's tokens, over all keys of their sequence.

    Computes ``softmax(query . key * scale) . value`` over the keys that a query sees (FlashAttention-2,
    arXiv 2307.08691). With p the position of the query and j that of the key, both counted along dimension 1
    of ``key``, key j is seen when it lies in the sequence's ``[start, end)`` of ``key_ranges`` and

    - causal: ``j <= p``, and with a window ``j > p - window``;
    - bidirectional: anything, and with a window ``|j - p| <= window``.

    These are the inequalities of transformers' ``sliding_window_overlay`` and
    ``sliding_window_bidirectional_overlay``.

    Args:
        query: ``[queries, heads, head_dim]``, the queries of all sequences behind each other; any strides,
            last dimension contiguous.
        key: ``[batch, keys, kv_heads, head_dim]``; any strides, last dimension contiguous, so that a
            transposed view of a cache is read in place; ``heads`` is a multiple of ``kv_heads``. A first
            dimension of 1 with a larger batch means that all sequences lie behind each other in dimension 1.
        value: the same shape and dtype as ``key``.
        positions: ``[queries]`` int64 or int32, the index along dimension 1 of ``key`` of each query's own
            token; ascending within a sequence.
        query_offsets: ``[batch + 1]`` int64 or int32; sequence b owns the queries from ``query_offsets[b]`` to
            ``query_offsets[b + 1]``.
        key_ranges: ``[batch, 2]`` int64 or int32; sequence b's keys are ``key_ranges[b, 0]`` up to, without,
            ``key_ranges[b, 1]`` along dimension 1. Padding on either side lies outside.
        longest: upper bound on the number of queries of one sequence, known to the host.
        causal: whether a query sees only the keys up to its own position.
        scale: factor on the products, positive.
        window: width of a sliding window in tokens, positive; None for none.
        softcap: cap c on the scaled products, which become ``c * tanh(product / c)`` (Gemma 2); None for none.

    Returns:
        ``[queries, heads, head_dim]`` in ``query.dtype``, contiguous. A query that sees no key gets zeros.
        Differentiable through the reference: the kernel runs only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device, stride or number does not fit; with ``set_debug(True)``
            also when offsets, ranges or positions point outside.

    Example:
        >>> query, key = torch.zeros(2, 1, 1), torch.zeros(1, 4, 1, 1)
        >>> value = torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 4, 1, 1)
        >>> attention_rows(query, key, value, positions=torch.tensor([1, 3]),
        ...                query_offsets=torch.tensor([0, 2]), key_ranges=torch.tensor([[0, 4]]),
        ...                longest=2, causal=True, scale=1.0).flatten()
        tensor([2., 4.])
    """
    check_arguments(query, key, value, positions, query_offsets, key_ranges, longest)
    check_positive("scale", scale)
    if window is not None:
        check_positive("window", window)
    if softcap is not None:
        check_positive("softcap", softcap)
    rules = (positions, query_offsets, key_ranges, longest, causal, scale, window, softcap)
    if runs_kernel(query, key, value) and query.shape[2] <= WIDEST_HEAD:
        return attention_rows_op(query, key, value, *rules)
    return attention_rows_reference(query, key, value, *rules)


@kernel_op("attention_rows")
def attention_rows_op(
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
    """Launch the kernel; the arguments have been checked."""
    heads, width, kv_heads = int(query.shape[1]), int(query.shape[2]), int(key.shape[2])
    blocks = blocks_for(query, longest)
    # One program to spare: an empty launch needs no branch on the number of queries.
    grid = (longest // blocks.queries + 1, heads, key_ranges.shape[0])
    out = query.new_empty(query.shape)
    # All sequences behind each other: none of them lies a batch stride away.
    packed = key.shape[0] == 1
    with torch.cuda.device_of(query):
        wrap_triton(_attention_rows_kernel)[grid](
            query,
            key,
            value,
            positions,
            query_offsets,
            key_ranges,
            out,
            width,
            query.stride(0),
            query.stride(1),
            0 if packed else key.stride(0),
            key.stride(1),
            key.stride(2),
            0 if packed else value.stride(0),
            value.stride(1),
            value.stride(2),
            positions.stride(0),
            query_offsets.stride(0),
            key_ranges.stride(0),
            key_ranges.stride(1),
            0 if window is None else window,
            0.0 if softcap is None else scale / softcap,
            # exp2 in the kernel: log2(e) goes into the factor.
            (scale if softcap is None else softcap) * math.log2(math.e),
            CAUSAL=causal,
            HAS_WINDOW=window is not None,
            HAS_SOFTCAP=softcap is not None,
            HEADS=heads,
            GROUP=heads // kv_heads,
            BLOCK_QUERIES=blocks.queries,
            BLOCK_KEYS=blocks.keys,
            BLOCK_WIDTH=block_width(width),
            EVEN_WIDTH=block_width(width) == width,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
    return out


@jit
def _attention_rows_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    positions_ptr,
    offsets_ptr,
    ranges_ptr,
    out_ptr,
    width,
    query_stride_token,
    query_stride_head,
    key_stride_batch,
    key_stride_token,
    key_stride_head,
    value_stride_batch,
    value_stride_token,
    value_stride_head,
    positions_stride,
    offsets_stride,
    ranges_stride_batch,
    ranges_stride_side,
    window,
    tanh_scale,
    log2_scale,
    CAUSAL: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
):
    # torch.compile passes numbers as float64, which would spread to every product.
    tanh_scale, log2_scale = tl.cast(tanh_scale, tl.float32), tl.cast(log2_scale, tl.float32)
    # Neighbouring programs are blocks of one head, so that its keys are read from L2.
    block = tl.program_id(0)
    if CAUSAL:
        # Late queries see the most keys: they start first.
        block = tl.num_programs(0) - 1 - block
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    begin = tl.load(offsets_ptr + batch * offsets_stride).to(tl.int64)
    count = tl.load(offsets_ptr + (batch + 1) * offsets_stride).to(tl.int64) - begin
    if block.to(tl.int64) * BLOCK_QUERIES < count:
        own = block.to(tl.int64) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
        # Beyond the sequence the last query is repeated, so that nothing below has to know.
        row = begin + tl.minimum(own, count - 1)
        columns = tl.arange(0, BLOCK_WIDTH)
        query_tile = query_ptr + (row * query_stride_token + head * query_stride_head)[:, None]
        if EVEN_WIDTH:
            query = tl.load(query_tile + columns[None, :])
        else:
            query = tl.load(query_tile + columns[None, :], mask=(columns < width)[None, :], other=0.0)

        # Which keys a query sees is one range [low, high): all of the rules are bounds on the key's index.
        position = tl.load(positions_ptr + row * positions_stride).to(tl.int32)
        start = tl.load(ranges_ptr + batch * ranges_stride_batch).to(tl.int32)
        end = tl.load(ranges_ptr + batch * ranges_stride_batch + ranges_stride_side).to(tl.int32)
        if CAUSAL:
            high = tl.minimum(position + 1, end)
            if HAS_WINDOW:
                low = tl.maximum(position + 1 - window, start)
        elif HAS_WINDOW:
            high = tl.minimum(position + 1 + window, end)
            low = tl.maximum(position - window, start)
        if CAUSAL or HAS_WINDOW:
            last = tl.max(high, axis=0)
            last_for_all = tl.min(high, axis=0)
        else:
            high = tl.zeros((BLOCK_QUERIES,), dtype=tl.int32) + end
            last = end
            last_for_all = end
        if HAS_WINDOW:
            first = tl.min(low, axis=0)
            first_for_all = tl.max(low, axis=0)
        else:
            low = tl.zeros((BLOCK_QUERIES,), dtype=tl.int32) + start
            first = start
            first_for_all = start

        # The loops over whole tiles that every query sees, [inner, outer), need no mask.
        inner = first
        if HAS_WINDOW:
            inner = first + (first_for_all - first + BLOCK_KEYS - 1) // BLOCK_KEYS * BLOCK_KEYS
            # Far apart queries: all of the tiles go into the first loop.
            inner = tl.minimum(
                inner, first + (tl.maximum(last - first, 0) + BLOCK_KEYS - 1) // BLOCK_KEYS * BLOCK_KEYS
            )
        outer = inner + tl.maximum(last_for_all - inner, 0) // BLOCK_KEYS * BLOCK_KEYS

        key_head = key_ptr + batch * key_stride_batch + head // GROUP * key_stride_head
        value_head = value_ptr + batch * value_stride_batch + head // GROUP * value_stride_head
        total = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), dtype=tl.float32)
        weight = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
        peak = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
        if HAS_WINDOW:
            total, weight, peak = _attend_tiles(
                total,
                weight,
                peak,
                query,
                key_head,
                value_head,
                key_stride_token,
                value_stride_token,
                first,
                inner,
                low,
                high,
                end,
                width,
                tanh_scale,
                log2_scale,
                True,
                True,
                HAS_SOFTCAP,
                EVEN_WIDTH,
                BLOCK_KEYS,
                BLOCK_WIDTH,
            )
        total, weight, peak = _attend_tiles(
            total,
            weight,
            peak,
            query,
            key_head,
            value_head,
            key_stride_token,
            value_stride_token,
            inner,
            outer,
            low,
            high,
            end,
            width,
            tanh_scale,
            log2_scale,
            False,
            False,
            HAS_SOFTCAP,
            EVEN_WIDTH,
            BLOCK_KEYS,
            BLOCK_WIDTH,
        )
        total, weight, peak = _attend_tiles(
            total,
            weight,
            peak,
            query,
            key_head,
            value_head,
            key_stride_token,
            value_stride_token,
            outer,
            last,
            low,
            high,
            end,
            width,
            tanh_scale,
            log2_scale,
            True,
            HAS_WINDOW,
            HAS_SOFTCAP,
            EVEN_WIDTH,
            BLOCK_KEYS,
            BLOCK_WIDTH,
        )
        # A query that saw no key has weight and total zero.
        total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
        target = out_ptr + (((begin + own) * HEADS + head) * width)[:, None] + columns[None, :]
        inside = (own < count)[:, None] & (columns < width)[None, :]
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _attend_tiles(
    total,
    weight,
    peak,
    query,
    key_head,
    value_head,
    key_stride,
    value_stride,
    first,
    last,
    low,
    high,
    end,
    width,
    tanh_scale,
    log2_scale,
    MASKED: tl.constexpr,
    MASKED_LOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Online softmax over the keys from ``first`` to ``last``; a tile that all queries see needs no mask."""
    columns = tl.arange(0, BLOCK_WIDTH)
    for tile in range(first, last, BLOCK_KEYS):
        index = tile + tl.arange(0, BLOCK_KEYS)
        # int64: keys x kv_heads x head_dim passes 2**31 at 512k tokens of 4096.
        offsets = index.to(tl.int64)
        key_tile = key_head + (offsets * key_stride)[:, None] + columns[None, :]
        value_tile = value_head + (offsets * value_stride)[:, None] + columns[None, :]
        if MASKED:
            inside = (index < end)[:, None] & (columns < width)[None, :]
            key = tl.load(key_tile, mask=inside, other=0.0)
        elif EVEN_WIDTH:
            key = tl.load(key_tile)
        else:
            key = tl.load(key_tile, mask=(columns < width)[None, :], other=0.0)
        # "ieee": TF32 would cost float32 inputs half their digits; half precision ignores it.
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if HAS_SOFTCAP:
            # tanh(u) = 1 - 2 / (1 + exp(2u)), with 2 * log2(e) = 2.8853900817779268.
            scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (tanh_scale * 2.8853900817779268)))
        if MASKED:
            seen = index[None, :] < high[:, None]
            if MASKED_LOW:
                seen = seen & (index[None, :] >= low[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * log2_scale)
        base = new_peak
        if MASKED:
            # Nothing seen yet: -inf minus -inf would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * log2_scale - base[:, None])
        fade = tl.exp2(peak - base)
        weight = weight * fade + tl.sum(weights, axis=1)
        total = total * fade[:, None]
        if MASKED:
            value = tl.load(value_tile, mask=inside, other=0.0)
        elif EVEN_WIDTH:
            value = tl.load(value_tile)
        else:
            value = tl.load(value_tile, mask=(columns < width)[None, :], other=0.0)
        total = tl.dot(weights.to(value.dtype), value, total, input_precision="ieee")
        peak = new_peak
    return total, weight, peak

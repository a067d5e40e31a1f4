"""Attention to texts longer than the model was trained for: far keys at grouped positions (arXiv 2401.01325)."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math

import torch
from torch import Tensor

from .arguments import check_positive
from .attention_blocks import WIDEST_HEAD, Blocks, block_width, blocks_for
from .attention_rows_arguments import check_arguments
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .self_extend_arguments import check_extension
from .self_extend_decode import decodes, self_extend_decode_op
from .self_extend_reference import far_turns, self_extend_reference, turned_further


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
    turns: tuple[Tensor, Tensor] | None = None,
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
        turns: what ``far_turns`` gives for at least as many places as ``key`` has, kept from call to call; None makes
            them anew.

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
    check_arguments(query, key, value, positions, query_offsets, key_ranges, longest)
    check_extension(query, key, inv_freq, group, window, trained, turns)
    check_positive("scale", scale)
    if softcap is not None:
        check_positive("softcap", softcap)
    if turns is None:
        turns = far_turns(inv_freq, group, key.shape[1], interleaved)
    where = (positions, query_offsets, key_ranges)
    kernel = runs_kernel(query, key, value) and query.shape[2] <= WIDEST_HEAD
    if kernel and decodes(query, key, longest, causal):
        numbers = (longest, scale, group, window, trained, softcap, interleaved)
        return self_extend_decode_op(query, key, value, inv_freq, *turns, *where, *numbers)
    behind, ahead, key_far = turned_further(
        query, key, inv_freq, turns, *where, group, window, causal, interleaved
    )
    rules = (positions, query_offsets, key_ranges, longest, causal, scale, window, trained, softcap)
    attend = self_extend_op if kernel else self_extend_reference
    return attend(query, key, value, behind, ahead, key_far, *rules)


@kernel_op("self_extend")
def self_extend_op(
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
    """Launch the kernel; the arguments have been checked. Both kinds of turned queries have the same strides."""
    heads, width, kv_heads = int(query.shape[1]), int(query.shape[2]), int(key.shape[2])
    blocks = _fitting(blocks_for(query, longest), query, 2 if causal else 3)
    # One program to spare: an empty launch needs no branch on the number of queries.
    grid = (longest // blocks.queries + 1, heads, key_ranges.shape[0])
    out = query.new_empty(query.shape)
    # All sequences behind each other: none of them lies a batch stride away.
    packed = key.shape[0] == 1
    with torch.cuda.device_of(query):
        # fmt: off
        wrap_triton(_self_extend_kernel)[grid](
            query, query_behind, query_ahead, key, key_far, value, positions, query_offsets, key_ranges, out,
            width,
            query.stride(0), query.stride(1), query_behind.stride(0), query_behind.stride(1),
            0 if packed else key.stride(0), key.stride(1), key.stride(2),
            0 if packed else key_far.stride(0), key_far.stride(1), key_far.stride(2),
            0 if packed else value.stride(0), value.stride(1), value.stride(2),
            positions.stride(0), query_offsets.stride(0), key_ranges.stride(0), key_ranges.stride(1),
            window, trained,
            0.0 if softcap is None else scale / softcap,
            # exp2 in the kernel: log2(e) goes into the factor.
            (scale if softcap is None else softcap) * math.log2(math.e),
            CAUSAL=causal,
            HAS_AHEAD=not causal,
            HAS_SOFTCAP=softcap is not None,
            EVEN_WIDTH=block_width(width) == width,
            STAGES=blocks.stages,
            MIXED_STAGES=_mixed_stages(blocks, causal),
            HEADS=heads,
            GROUP=heads // kv_heads,
            BLOCK_QUERIES=blocks.queries,
            BLOCK_KEYS=blocks.keys,
            BLOCK_WIDTH=block_width(width),
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )
        # fmt: on
    return out


def _mixed_stages(blocks: Blocks, causal: bool) -> int:
    """How many tiles of two kinds of keys, and of their values, fit where ``blocks.stages`` of one kind do."""
    return max(2 * blocks.stages // 3, 1) if causal else 1


def _fitting(blocks: Blocks, query: Tensor, kinds: int) -> Blocks:
    """Fewer stages, then fewer queries, until all kinds of queries and the stages of keys and values fit."""
    if query.is_cuda:
        bytes_each = block_width(int(query.shape[2])) * query.element_size()
        room = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        while bytes_each * (kinds * blocks.queries + 2 * blocks.keys * blocks.stages) > room:
            if blocks.stages == 1 and blocks.queries == 16:
                break
            if blocks.stages > 1:
                blocks = blocks._replace(stages=blocks.stages - 1)
            else:
                blocks = blocks._replace(queries=blocks.queries // 2)
    return blocks


# fmt: off
@jit
def _self_extend_kernel(
    query_ptr, behind_ptr, ahead_ptr, key_ptr, far_ptr, value_ptr, positions_ptr, offsets_ptr, ranges_ptr, out_ptr,
    width,
    query_stride_token, query_stride_head, turned_stride_token, turned_stride_head,
    key_stride_batch, key_stride_token, key_stride_head,
    far_stride_batch, far_stride_token, far_stride_head,
    value_stride_batch, value_stride_token, value_stride_head,
    positions_stride, offsets_stride, ranges_stride_batch, ranges_stride_side,
    window, trained, tanh_scale, log2_scale,
    CAUSAL: tl.constexpr,
    HAS_AHEAD: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    MIXED_STAGES: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # fmt: on
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
        channels = (columns < width)[None, :]
        offsets = (row * query_stride_token + head * query_stride_head)[:, None] + columns[None, :]
        turned = (row * turned_stride_token + head * turned_stride_head)[:, None] + columns[None, :]
        behind = tl.load(behind_ptr + turned, mask=channels, other=0.0)

        # All indices below are places in the text.
        start = tl.load(ranges_ptr + batch * ranges_stride_batch).to(tl.int64)
        end = tl.load(ranges_ptr + batch * ranges_stride_batch + ranges_stride_side).to(tl.int64)
        length = tl.maximum(end - start, 0).to(tl.int32)
        place = (tl.load(positions_ptr + row * positions_stride).to(tl.int64) - start).to(tl.int32)
        # Where the model is left alone, every key is near.
        if CAUSAL:
            reach = tl.where(place >= trained, window, 1 << 29)
            high = tl.minimum(place + 1, length)
        else:
            reach = tl.zeros((BLOCK_QUERIES,), dtype=tl.int32) + tl.where(length > trained, window, 1 << 29)
            high = tl.zeros((BLOCK_QUERIES,), dtype=tl.int32) + length
        near_from = place - reach + 1
        near_to = place + reach
        last = tl.maximum(tl.max(high, axis=0), 0)
        # Whole tiles: [0, far) behind all, [far, near) near for some, [near, seen) near for all and seen by all.
        far = _clipped(tl.min(near_from, axis=0), last) // BLOCK_KEYS * BLOCK_KEYS
        near = (_clipped(tl.max(near_from, axis=0), last) + BLOCK_KEYS - 1) // BLOCK_KEYS * BLOCK_KEYS
        seen = _clipped(tl.min(high, axis=0), last) // BLOCK_KEYS * BLOCK_KEYS
        if HAS_AHEAD:
            seen = tl.minimum(seen, _clipped(tl.min(near_to, axis=0), last) // BLOCK_KEYS * BLOCK_KEYS)
        seen = tl.maximum(seen, near)

        key_head = (
            key_ptr + batch * key_stride_batch + head // GROUP * key_stride_head + start * key_stride_token
        )
        far_head = (
            far_ptr + batch * far_stride_batch + head // GROUP * far_stride_head + start * far_stride_token
        )
        value_head = (
            value_ptr
            + batch * value_stride_batch
            + head // GROUP * value_stride_head
            + start * value_stride_token
        )
        ahead, beyond = behind, last
        if HAS_AHEAD:
            # [seen, beyond) ahead of some, [beyond, whole) ahead of all.
            ahead = tl.load(ahead_ptr + turned, mask=channels, other=0.0)
            beyond = (_clipped(tl.max(near_to, axis=0), last) + BLOCK_KEYS - 1) // BLOCK_KEYS * BLOCK_KEYS
            beyond = tl.maximum(beyond, seen)
            whole = tl.maximum(last // BLOCK_KEYS * BLOCK_KEYS, beyond)
        total = tl.zeros((BLOCK_QUERIES, BLOCK_WIDTH), dtype=tl.float32)
        weight = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
        peak = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
        # fmt: off
        total, weight, peak = _attend_tiles(
            total, weight, peak, behind, behind, ahead, key_head, far_head, value_head, key_stride_token,
            far_stride_token, value_stride_token, 0, far, near_from, near_to, high, last, width, tanh_scale,
            log2_scale, False, True, False, False, HAS_SOFTCAP, EVEN_WIDTH, STAGES, BLOCK_KEYS,
            BLOCK_WIDTH,
        )
        # Not before: queries of one kind less lie in shared memory while far keys are read.
        query = tl.load(query_ptr + offsets, mask=channels, other=0.0)
        total, weight, peak = _attend_tiles(
            total, weight, peak, query, behind, ahead, key_head, far_head, value_head, key_stride_token,
            far_stride_token, value_stride_token, far, tl.minimum(near, last), near_from, near_to, high, last, width,
            tanh_scale, log2_scale, True, True, HAS_AHEAD, True, HAS_SOFTCAP, EVEN_WIDTH, MIXED_STAGES, BLOCK_KEYS,
            BLOCK_WIDTH,
        )
        total, weight, peak = _attend_tiles(
            total, weight, peak, query, behind, ahead, key_head, far_head, value_head, key_stride_token,
            far_stride_token, value_stride_token, near, seen, near_from, near_to, high, last, width, tanh_scale,
            log2_scale, True, False, False, False, HAS_SOFTCAP, EVEN_WIDTH, STAGES, BLOCK_KEYS,
            BLOCK_WIDTH,
        )
        total, weight, peak = _attend_tiles(
            total, weight, peak, query, behind, ahead, key_head, far_head, value_head, key_stride_token,
            far_stride_token, value_stride_token, seen, tl.minimum(beyond, last), near_from, near_to, high, last, width,
            tanh_scale, log2_scale, True, False, HAS_AHEAD, True, HAS_SOFTCAP, EVEN_WIDTH,
            MIXED_STAGES if HAS_AHEAD else STAGES, BLOCK_KEYS, BLOCK_WIDTH,
        )
        if HAS_AHEAD:
            total, weight, peak = _attend_tiles(
                total, weight, peak, query, behind, ahead, key_head, far_head, value_head, key_stride_token,
                far_stride_token, value_stride_token, beyond, whole, near_from, near_to, high, last, width, tanh_scale,
                log2_scale, False, False, True, False, HAS_SOFTCAP, EVEN_WIDTH, STAGES, BLOCK_KEYS,
                BLOCK_WIDTH,
            )
            total, weight, peak = _attend_tiles(
                total, weight, peak, query, behind, ahead, key_head, far_head, value_head, key_stride_token,
                far_stride_token, value_stride_token, whole, last, near_from, near_to, high, last, width, tanh_scale,
                log2_scale, False, False, True, True, HAS_SOFTCAP, EVEN_WIDTH, STAGES, BLOCK_KEYS,
                BLOCK_WIDTH,
            )
        # fmt: on
        # A query that saw no key has weight and total zero.
        total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
        target = out_ptr + (((begin + own) * HEADS + head) * width)[:, None] + columns[None, :]
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=(own < count)[:, None] & channels)


@jit
def _clipped(index, last):
    """``index`` between 0 and ``last``."""
    return tl.minimum(tl.maximum(index, 0), last)


# fmt: off
@jit
def _attend_tiles(
    total, weight, peak, query, behind, ahead, key_head, far_head, value_head, key_stride, far_stride, value_stride,
    first, last, near_from, near_to, high, end, width, tanh_scale, log2_scale,
    NEAR: tl.constexpr,
    BEHIND: tl.constexpr,
    AHEAD: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVEN_WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # fmt: on
    """Online softmax over the keys from ``first`` to ``last``, which are near, behind or ahead for some query."""
    for tile in tl.range(first, last, BLOCK_KEYS, num_stages=STAGES):
        index = tile + tl.arange(0, BLOCK_KEYS)
        # "ieee": TF32 would cost float32 inputs half their digits; half precision ignores it.
        if BEHIND or AHEAD:
            far = tl.trans(_tile(far_head, far_stride, index, end, width, MASKED, EVEN_WIDTH, BLOCK_WIDTH))
        if NEAR:
            key = _tile(key_head, key_stride, index, end, width, MASKED, EVEN_WIDTH, BLOCK_WIDTH)
            scores = tl.dot(query, tl.trans(key), input_precision="ieee")
            if BEHIND:
                other = tl.dot(behind, far, input_precision="ieee")
                scores = tl.where(index[None, :] < near_from[:, None], other, scores)
            if AHEAD:
                other = tl.dot(ahead, far, input_precision="ieee")
                scores = tl.where(index[None, :] >= near_to[:, None], other, scores)
        elif BEHIND:
            scores = tl.dot(behind, far, input_precision="ieee")
        else:
            scores = tl.dot(ahead, far, input_precision="ieee")
        if HAS_SOFTCAP:
            # tanh(u) = 1 - 2 / (1 + exp(2u)), with 2 * log2(e) = 2.8853900817779268.
            scores = 1.0 - 2.0 / (1.0 + tl.exp2(scores * (tanh_scale * 2.8853900817779268)))
        if MASKED:
            scores = tl.where(index[None, :] < high[:, None], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1) * log2_scale)
        base = new_peak
        if MASKED:
            # Nothing seen yet: -inf minus -inf would be NaN.
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores * log2_scale - base[:, None])
        fade = tl.exp2(peak - base)
        weight = weight * fade + tl.sum(weights, axis=1)
        value = _tile(value_head, value_stride, index, end, width, MASKED, EVEN_WIDTH, BLOCK_WIDTH)
        total = tl.dot(weights.to(value.dtype), value, total * fade[:, None], input_precision="ieee")
        peak = new_peak
    return total, weight, peak


@jit
def _tile(
    head, stride, index, end, width, MASKED: tl.constexpr, EVEN_WIDTH: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    """Keys or values of one head at some places, zeros from ``end`` on."""
    columns = tl.arange(0, BLOCK_WIDTH)
    # int64: keys x kv_heads x head_dim passes 2**31 at 512k tokens of 4096.
    pointers = head + (index.to(tl.int64) * stride)[:, None] + columns[None, :]
    if MASKED:
        found = tl.load(pointers, mask=(index < end)[:, None] & (columns < width)[None, :], other=0.0)
    elif EVEN_WIDTH:
        found = tl.load(pointers)
    else:
        found = tl.load(pointers, mask=(columns < width)[None, :], other=0.0)
    return found

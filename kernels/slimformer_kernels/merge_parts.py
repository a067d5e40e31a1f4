"""Attention over keys that were split among programs, made one (flash decoding).

A part is what one program found: the weighted sum of values ``[batch, kv_heads, splits, rows, width]`` in float32,
behind all of these the sums of weights ``[batch, kv_heads, splits, rows]``, and behind them the greatest scores.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from .dispatch import jit, tl


# fmt: off
@jit
def merge_rows(
    parts_ptr, all_rows, first, valid, out_ptr, out_row, width,
    SPLITS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # fmt: on
    """The parts of all rows of one key head, by one program: those of ``first``, ``[BLOCK_ROWS]``, into ``out_row``."""
    sums_ptr = parts_ptr + all_rows * width
    columns = tl.arange(0, BLOCK_WIDTH)
    total = tl.zeros((BLOCK_ROWS, BLOCK_WIDTH), dtype=tl.float32)
    weight = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    peak = tl.full((BLOCK_ROWS,), float("-inf"), dtype=tl.float32)
    for split in range(0, SPLITS, 8):
        # Unrolled, so that eight parts are on their way before the first is added.
        for ahead in tl.static_range(8):
            part = first + (split + ahead) * BLOCK_ROWS
            there = valid & (split + ahead < SPLITS)
            inside = there[:, None] & (columns < width)[None, :]
            part_total = tl.load(parts_ptr + (part * width)[:, None] + columns[None, :], mask=inside, other=0.0)
            part_weight = tl.load(sums_ptr + part, mask=there, other=0.0)
            part_peak = tl.load(sums_ptr + all_rows + part, mask=there, other=float("-inf"))
            new_peak = tl.maximum(peak, part_peak)
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            fade, part_fade = tl.exp2(peak - base), tl.exp2(part_peak - base)
            total = total * fade[:, None] + part_total * part_fade[:, None]
            weight = weight * fade + part_weight * part_fade
            peak = new_peak
    # A query that saw no key has weight and total zero.
    total = total / tl.where(weight == 0.0, 1.0, weight)[:, None]
    target = out_ptr + (out_row * width)[:, None] + columns[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (columns < width)[None, :])


# fmt: off
@jit
def merge_kernel(
    parts_ptr, offsets_ptr, out_ptr, width,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # fmt: on
    """The parts of one query and head, by a program of its own: for so many rows that one program would take long."""
    query = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    begin = tl.load(offsets_ptr + batch).to(tl.int64)
    count = tl.load(offsets_ptr + batch + 1).to(tl.int64) - begin
    if query < count:
        splits = tl.arange(0, BLOCK_SPLITS)
        columns = tl.arange(0, BLOCK_WIDTH)
        part = (batch * (HEADS // GROUP) + head // GROUP) * SPLITS + splits
        row = part * ROWS + query * GROUP + head % GROUP
        all_rows = tl.num_programs(2).to(tl.int64) * (HEADS // GROUP) * SPLITS * ROWS
        sums_ptr = parts_ptr + all_rows * width
        weights = tl.load(sums_ptr + row, mask=splits < SPLITS, other=0.0)
        peaks = tl.load(sums_ptr + all_rows + row, mask=splits < SPLITS, other=float("-inf"))
        peak = tl.max(peaks, axis=0)
        # A query that saw no key has weights and totals of zero.
        fades = tl.exp2(peaks - tl.where(peak == float("-inf"), 0.0, peak))
        weight = tl.sum(weights * fades, axis=0)
        inside = (splits < SPLITS)[:, None] & (columns < width)[None, :]
        totals = tl.load(parts_ptr + (row * width)[:, None] + columns[None, :], mask=inside, other=0.0)
        total = tl.sum(totals * fades[:, None], axis=0) / tl.where(weight == 0.0, 1.0, weight)
        target = out_ptr + ((begin + query) * HEADS + head) * width + columns
        tl.store(target, total.to(out_ptr.dtype.element_ty), mask=columns < width)

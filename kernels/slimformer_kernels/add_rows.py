"""Residual add into selected rows: the scatter costs nothing, because the add writes by index."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_update
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .row_tiles import row_count, row_programs, row_tile

# The add has no reduction over a row, so wide rows are cut into pieces.
_WIDEST_PIECE = 4096


def add_rows_(x: Tensor, rows: Tensor | None, y: Tensor) -> Tensor:
    """``x[rows] += y`` in place; the other rows of ``x`` are not touched.

    The sum is taken in float32 and rounded once to ``x.dtype``. Unique rows mean no atomics: the result is
    deterministic.

    Args:
        x: ``[tokens, hidden]``, changed in place; rows may be strided, the last dimension is contiguous.
        rows: ``[kept]`` int64 or int32 row indices, sorted and unique; None for all rows.
        y: ``[kept, hidden]`` in ``x.dtype``; must not share memory with ``x``.

    Returns:
        ``x`` itself. Differentiable through the reference: the kernel runs only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit; with ``set_debug(True)`` also when
            ``rows`` is unsorted, has repeats or points outside ``x``.

    Example:
        >>> x = torch.zeros(3, 2)
        >>> add_rows_(x, torch.tensor([0, 2]), torch.ones(2, 2))
        tensor([[1., 1.],
                [0., 0.],
                [1., 1.]])
    """
    check_update(x, rows, y)
    if runs_kernel(x, y):
        add_rows_op(x, rows, y)
        return x
    return add_rows_reference(x, rows, y)


def add_rows_reference(x: Tensor, rows: Tensor | None, y: Tensor) -> Tensor:
    """``add_rows_`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    return x.add_(y) if rows is None else x.index_add_(0, rows, y)


@kernel_op("add_rows_", mutates=("x",))
def add_rows_op(x: Tensor, rows: Tensor | None, y: Tensor) -> None:
    """Launch the kernel; the arguments have been checked."""
    count, width = row_count(x, rows), int(x.shape[1])
    tile = row_tile(width, widest=_WIDEST_PIECE)
    pieces = (width + tile.columns - 1) // tile.columns
    with torch.cuda.device_of(x):
        wrap_triton(_add_rows_kernel)[(row_programs(count, tile), pieces)](
            x,
            rows,
            y,
            count,
            width,
            x.stride(0),
            0 if rows is None else rows.stride(0),
            y.stride(0),
            HAS_ROWS=rows is not None,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
        )


@jit
def _add_rows_kernel(
    x_ptr,
    rows_ptr,
    y_ptr,
    count,
    width,
    x_stride,
    rows_stride,
    y_stride,
    HAS_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # int64: tokens x hidden passes 2**31 at 512k tokens of 4096.
    compact = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = compact < count
    source = compact
    if HAS_ROWS:
        source = tl.load(rows_ptr + compact * rows_stride, mask=exists, other=0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = exists[:, None] & (columns < width)[None, :]
    target = x_ptr + (source * x_stride)[:, None] + columns[None, :]
    residual = tl.load(target, mask=inside, other=0.0)
    update = tl.load(y_ptr + (compact * y_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    total = residual.to(tl.float32) + update.to(tl.float32)
    tl.store(target, total.to(residual.dtype), mask=inside)

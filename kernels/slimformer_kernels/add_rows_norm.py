"""Residual add into selected rows and the next sublayer's norm of the same rows, in one pass over memory."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from .add_rows import add_rows_reference
from .arguments import check_positive, check_update, check_vector
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .layer_norm_rows import layer_norm_rows_reference, layer_normed
from .rms_norm_rows import rms_norm_rows_reference, rms_normed
from .row_tiles import WIDEST_NORM_ROW, row_count, row_programs, row_tile


def add_rows_rms_norm_(
    x: Tensor,
    rows: Tensor | None,
    y: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    multiply_in_fp32: bool | None = None,
) -> Tensor:
    """``add_rows_(x, rows, y)`` and then ``rms_norm_rows(x, rows, weight, eps)``, fused.

    The norm sees the sum rounded to ``x.dtype``, so that the result is the same as that of the two calls.

    Args:
        x: ``[tokens, hidden]``, changed in place; rows may be strided, the last dimension is contiguous.
        rows: ``[kept]`` int64 or int32 row indices, sorted and unique; None for all rows.
        y: ``[kept, hidden]`` in ``x.dtype``; must not share memory with ``x``.
        weight: ``[hidden]``.
        eps: added to the mean square; positive.
        offset: added to the weight: 0.0 for Llama-type models, 1.0 for Gemma-type ``(1 + weight)``.
        multiply_in_fp32: order of rounding, as in ``rms_norm_rows``.

    Returns:
        The normed rows, ``[kept, hidden]`` in ``x.dtype``, contiguous. Differentiable through the reference:
        the kernel runs only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit; with ``set_debug(True)`` also when
            ``rows`` is unsorted, has repeats or points outside ``x``.

    Example:
        >>> x = torch.zeros(2, 2)
        >>> add_rows_rms_norm_(x, torch.tensor([1]), torch.tensor([[3.0, 4.0]]), torch.ones(2), 1e-6)
        tensor([[0.8485, 1.1314]])
        >>> x
        tensor([[0., 0.],
                [3., 4.]])
    """
    check_update(x, rows, y)
    check_vector("weight", weight, x)
    check_positive("eps", eps)
    if multiply_in_fp32 is None:
        multiply_in_fp32 = offset != 0.0
    if runs_kernel(x, y, weight) and x.shape[1] <= WIDEST_NORM_ROW:
        return add_rows_rms_norm_op(x, rows, y, weight, eps, offset, multiply_in_fp32)
    add_rows_reference(x, rows, y)
    return rms_norm_rows_reference(x, rows, weight, eps, offset, multiply_in_fp32)


def add_rows_layer_norm_(
    x: Tensor, rows: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """``add_rows_(x, rows, y)`` and then ``layer_norm_rows(x, rows, weight, bias, eps)``, fused.

    The norm sees the sum rounded to ``x.dtype``, so that the result is the same as that of the two calls.

    Args:
        x: ``[tokens, hidden]``, changed in place; rows may be strided, the last dimension is contiguous.
        rows: ``[kept]`` int64 or int32 row indices, sorted and unique; None for all rows.
        y: ``[kept, hidden]`` in ``x.dtype``; must not share memory with ``x``.
        weight: ``[hidden]``.
        bias: ``[hidden]`` or None.
        eps: added to the variance; positive.

    Returns:
        The normed rows, ``[kept, hidden]`` in ``x.dtype``, contiguous. Differentiable through the reference:
        the kernel runs only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit; with ``set_debug(True)`` also when
            ``rows`` is unsorted, has repeats or points outside ``x``.

    Example:
        >>> x = torch.zeros(2, 2)
        >>> add_rows_layer_norm_(x, torch.tensor([1]), torch.tensor([[1.0, 3.0]]), torch.ones(2))
        tensor([[-1.0000,  1.0000]])
    """
    check_update(x, rows, y)
    check_vector("weight", weight, x)
    if bias is not None:
        check_vector("bias", bias, x)
    check_positive("eps", eps)
    if runs_kernel(x, y, weight, bias) and x.shape[1] <= WIDEST_NORM_ROW:
        return add_rows_layer_norm_op(x, rows, y, weight, bias, eps)
    add_rows_reference(x, rows, y)
    return layer_norm_rows_reference(x, rows, weight, bias, eps)


@kernel_op("add_rows_rms_norm_", mutates=("x",))
def add_rows_rms_norm_op(
    x: Tensor,
    rows: Tensor | None,
    y: Tensor,
    weight: Tensor,
    eps: float,
    offset: float,
    multiply_in_fp32: bool,
) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    count, width = row_count(x, rows), int(x.shape[1])
    tile = row_tile(width, widest=WIDEST_NORM_ROW)
    out = x.new_empty((count, width))
    with torch.cuda.device_of(x):
        wrap_triton(_add_rows_rms_norm_kernel)[(row_programs(count, tile),)](
            x,
            rows,
            y,
            weight,
            out,
            count,
            width,
            x.stride(0),
            0 if rows is None else rows.stride(0),
            y.stride(0),
            eps,
            offset,
            HAS_ROWS=rows is not None,
            MULTIPLY_IN_FP32=multiply_in_fp32,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return out


@kernel_op("add_rows_layer_norm_", mutates=("x",))
def add_rows_layer_norm_op(
    x: Tensor, rows: Tensor | None, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    count, width = row_count(x, rows), int(x.shape[1])
    tile = row_tile(width, widest=WIDEST_NORM_ROW)
    out = x.new_empty((count, width))
    with torch.cuda.device_of(x):
        wrap_triton(_add_rows_layer_norm_kernel)[(row_programs(count, tile),)](
            x,
            rows,
            y,
            weight,
            bias,
            out,
            count,
            width,
            x.stride(0),
            0 if rows is None else rows.stride(0),
            y.stride(0),
            eps,
            HAS_ROWS=rows is not None,
            HAS_BIAS=bias is not None,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return out


@jit
def _add_rows_rms_norm_kernel(
    x_ptr,
    rows_ptr,
    y_ptr,
    weight_ptr,
    out_ptr,
    count,
    width,
    x_stride,
    rows_stride,
    y_stride,
    eps,
    offset,
    HAS_ROWS: tl.constexpr,
    MULTIPLY_IN_FP32: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # int64: tokens x hidden passes 2**31 at 512k tokens of 4096.
    compact = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = compact < count
    source = compact
    if HAS_ROWS:
        source = tl.load(rows_ptr + compact * rows_stride, mask=exists, other=0).to(tl.int64)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inside = exists[:, None] & (columns < width)[None, :]
    total = _add_tile(x_ptr, y_ptr, source * x_stride, compact * y_stride, columns, inside)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0)
    normed = rms_normed(total, weight, width, eps, offset, MULTIPLY_IN_FP32)
    tl.store(out_ptr + (compact * width)[:, None] + columns[None, :], normed, mask=inside)


@jit
def _add_rows_layer_norm_kernel(
    x_ptr,
    rows_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    count,
    width,
    x_stride,
    rows_stride,
    y_stride,
    eps,
    HAS_ROWS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # int64: tokens x hidden passes 2**31 at 512k tokens of 4096.
    compact = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = compact < count
    source = compact
    if HAS_ROWS:
        source = tl.load(rows_ptr + compact * rows_stride, mask=exists, other=0).to(tl.int64)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inside = exists[:, None] & (columns < width)[None, :]
    total = _add_tile(x_ptr, y_ptr, source * x_stride, compact * y_stride, columns, inside)
    normed = layer_normed(total, weight_ptr, bias_ptr, columns, width, eps, HAS_BIAS)
    tl.store(out_ptr + (compact * width)[:, None] + columns[None, :], normed, mask=inside)


@jit
def _add_tile(x_ptr, y_ptr, x_offsets, y_offsets, columns, inside):
    """Add a tile of y to its rows of x in place; return the sum as stored, rounded to the dtype of x."""
    target = x_ptr + x_offsets[:, None] + columns[None, :]
    residual = tl.load(target, mask=inside, other=0.0)
    update = tl.load(y_ptr + y_offsets[:, None] + columns[None, :], mask=inside, other=0.0)
    total = (residual.to(tl.float32) + update.to(tl.float32)).to(residual.dtype)
    tl.store(target, total, mask=inside)
    return total

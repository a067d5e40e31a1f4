"""Residual add and the next norm in one pass over memory, for layers that must leave their input alone."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import (
    check_device,
    check_dtype,
    check_floating,
    check_last_stride,
    check_matrix,
    check_positive,
    check_shape,
    check_vector,
)
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .layer_norm_rows import layer_norm_rows_reference, layer_normed
from .rms_norm_rows import rms_norm_rows_reference, rms_normed
from .row_tiles import WIDEST_NORM_ROW, row_programs, row_tile


def add_rms_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    multiply_in_fp32: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """``x + y`` and its RMSNorm, fused; ``x`` stays as it is.

    The norm sees the sum rounded to ``x.dtype``, so that the result is the same as that of the two steps.

    Args:
        x: ``[tokens, hidden]``; rows may be strided, the last dimension is contiguous.
        y: the same shape and dtype, rows strided or not.
        weight: ``[hidden]``.
        eps: added to the mean square; positive.
        offset: added to the weight: 0.0 for Llama-type models, 1.0 for Gemma-type ``(1 + weight)``.
        multiply_in_fp32: order of rounding, as in ``rms_norm_rows``.

    Returns:
        The sum and the normed sum, both ``[tokens, hidden]`` in ``x.dtype``, contiguous. Differentiable
        through the reference: the kernel runs only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit.

    Example:
        >>> add_rms_norm(torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 3.0]]), torch.ones(2), 1e-6)
        (tensor([[3., 4.]]), tensor([[0.8485, 1.1314]]))
    """
    _check(x, y, weight, eps)
    if multiply_in_fp32 is None:
        multiply_in_fp32 = offset != 0.0
    if runs_kernel(x, y, weight) and x.shape[1] <= WIDEST_NORM_ROW:
        return add_rms_norm_op(x, y, weight, eps, offset, multiply_in_fp32)
    return add_rms_norm_reference(x, y, weight, eps, offset, multiply_in_fp32)


def add_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``x + y`` and its LayerNorm, fused; ``x`` stays as it is.

    The norm sees the sum rounded to ``x.dtype``, so that the result is the same as that of the two steps.

    Args:
        x: ``[tokens, hidden]``; rows may be strided, the last dimension is contiguous.
        y: the same shape and dtype, rows strided or not.
        weight: ``[hidden]``.
        bias: ``[hidden]`` or None.
        eps: added to the variance; positive.

    Returns:
        The sum and the normed sum, both ``[tokens, hidden]`` in ``x.dtype``, contiguous. Differentiable
        through the reference: the kernel runs only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit.

    Example:
        >>> add_layer_norm(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]), torch.ones(2))
        (tensor([[1., 3.]]), tensor([[-1.0000,  1.0000]]))
    """
    _check(x, y, weight, eps)
    if bias is not None:
        check_vector("bias", bias, x)
    if runs_kernel(x, y, weight, bias) and x.shape[1] <= WIDEST_NORM_ROW:
        return add_layer_norm_op(x, y, weight, bias, eps)
    return add_layer_norm_reference(x, y, weight, bias, eps)


def add_rms_norm_reference(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """``add_rms_norm`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    total = x + y
    return total, rms_norm_rows_reference(total, None, weight, eps, offset, multiply_in_fp32)


def add_layer_norm_reference(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """``add_layer_norm`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    total = x + y
    return total, layer_norm_rows_reference(total, None, weight, bias, eps)


@kernel_op("add_rms_norm")
def add_rms_norm_op(
    x: Tensor, y: Tensor, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; the arguments have been checked."""
    count, width = x.shape[0], int(x.shape[1])
    tile = row_tile(width, widest=WIDEST_NORM_ROW)
    total, out = x.new_empty((count, width)), x.new_empty((count, width))
    with torch.cuda.device_of(x):
        wrap_triton(_add_rms_norm_kernel)[(row_programs(count, tile),)](
            x,
            y,
            weight,
            total,
            out,
            count,
            width,
            x.stride(0),
            y.stride(0),
            eps,
            offset,
            MULTIPLY_IN_FP32=multiply_in_fp32,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return total, out


@kernel_op("add_layer_norm")
def add_layer_norm_op(
    x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Launch the kernel; the arguments have been checked."""
    count, width = x.shape[0], int(x.shape[1])
    tile = row_tile(width, widest=WIDEST_NORM_ROW)
    total, out = x.new_empty((count, width)), x.new_empty((count, width))
    with torch.cuda.device_of(x):
        wrap_triton(_add_layer_norm_kernel)[(row_programs(count, tile),)](
            x,
            y,
            weight,
            bias,
            total,
            out,
            count,
            width,
            x.stride(0),
            y.stride(0),
            eps,
            HAS_BIAS=bias is not None,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return total, out


@jit
def _add_rms_norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    total_ptr,
    out_ptr,
    count,
    width,
    x_stride,
    y_stride,
    eps,
    offset,
    MULTIPLY_IN_FP32: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # int64: tokens x hidden passes 2**31 at 512k tokens of 4096.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inside = (row < count)[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + (row * x_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    y = tl.load(y_ptr + (row * y_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    total = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
    target = (row * width)[:, None] + columns[None, :]
    tl.store(total_ptr + target, total, mask=inside)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0)
    normed = rms_normed(total, weight, width, eps, offset, MULTIPLY_IN_FP32)
    tl.store(out_ptr + target, normed, mask=inside)


@jit
def _add_layer_norm_kernel(
    x_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    out_ptr,
    count,
    width,
    x_stride,
    y_stride,
    eps,
    HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # int64: tokens x hidden passes 2**31 at 512k tokens of 4096.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    inside = (row < count)[:, None] & (columns < width)[None, :]
    x = tl.load(x_ptr + (row * x_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    y = tl.load(y_ptr + (row * y_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    total = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
    target = (row * width)[:, None] + columns[None, :]
    tl.store(total_ptr + target, total, mask=inside)
    normed = layer_normed(total, weight_ptr, bias_ptr, columns, width, eps, HAS_BIAS)
    tl.store(out_ptr + target, normed, mask=inside)


def _check(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> None:
    check_matrix("x", x)
    check_floating("y", y)
    check_device("y", y, x, "x")
    check_dtype("y", y, x, "x")
    check_shape("y", y, x.shape, "the shape of x")
    check_last_stride("y", y)
    check_vector("weight", weight, x)
    check_positive("eps", eps)

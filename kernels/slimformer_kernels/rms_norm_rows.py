"""RMSNorm of selected rows: the gather costs nothing, because the norm reads rows by index."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_matrix, check_positive, check_rows, check_vector
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .row_tiles import WIDEST_NORM_ROW, row_count, row_programs, row_tile


def rms_norm_rows(
    x: Tensor,
    rows: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    multiply_in_fp32: bool | None = None,
) -> Tensor:
    """RMSNorm of ``x[rows]``, returned compact; ``x`` is read by index and never copied.

    Computes ``x * rsqrt(mean(x**2) + eps) * (offset + weight)`` in float32 (RMSNorm, arXiv 1910.07467).

    Args:
        x: ``[tokens, hidden]``; rows may be strided, the last dimension is contiguous.
        rows: ``[kept]`` int64 or int32 row indices, sorted and unique; None for all rows.
        weight: ``[hidden]``.
        eps: added to the mean square; positive.
        offset: added to the weight: 0.0 for Llama-type models, 1.0 for Gemma-type ``(1 + weight)``.
        multiply_in_fp32: where the result is rounded to ``x.dtype``. False: the normalised values are rounded
            first and then multiplied by the weight, as in LlamaRMSNorm. True: the product is taken in float32
            and rounded once, as in GemmaRMSNorm. None (default): True exactly when ``offset`` is not zero.

    Returns:
        ``[kept, hidden]`` in ``x.dtype``, contiguous. Differentiable through the reference: the kernel runs
        only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit; with ``set_debug(True)`` also when
            ``rows`` is unsorted, has repeats or points outside ``x``.

    Example:
        >>> x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
        >>> rms_norm_rows(x, torch.tensor([0, 2]), torch.ones(2), 1e-6)
        tensor([[0.8485, 1.1314],
                [0.8485, 1.1314]])
    """
    check_matrix("x", x)
    check_rows(rows, x)
    check_vector("weight", weight, x)
    check_positive("eps", eps)
    if multiply_in_fp32 is None:
        multiply_in_fp32 = offset != 0.0
    if runs_kernel(x, weight) and x.shape[1] <= WIDEST_NORM_ROW:
        return rms_norm_rows_op(x, rows, weight, eps, offset, multiply_in_fp32)
    return rms_norm_rows_reference(x, rows, weight, eps, offset, multiply_in_fp32)


def rms_norm_rows_reference(
    x: Tensor, rows: Tensor | None, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool
) -> Tensor:
    """``rms_norm_rows`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    compute = torch.promote_types(x.dtype, torch.float32)
    kept = (x if rows is None else x.index_select(0, rows)).to(compute)
    normed = kept * torch.rsqrt(kept.pow(2).mean(-1, keepdim=True) + eps)
    if not multiply_in_fp32:
        normed = normed.to(x.dtype).to(compute)
    return (normed * (offset + weight.to(compute))).to(x.dtype)


@kernel_op("rms_norm_rows")
def rms_norm_rows_op(
    x: Tensor, rows: Tensor | None, weight: Tensor, eps: float, offset: float, multiply_in_fp32: bool
) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    count, width = row_count(x, rows), int(x.shape[1])
    tile = row_tile(width, widest=WIDEST_NORM_ROW)
    out = x.new_empty((count, width))
    with torch.cuda.device_of(x):
        wrap_triton(_rms_norm_rows_kernel)[(row_programs(count, tile),)](
            x,
            rows,
            weight,
            out,
            count,
            width,
            x.stride(0),
            0 if rows is None else rows.stride(0),
            eps,
            offset,
            HAS_ROWS=rows is not None,
            MULTIPLY_IN_FP32=multiply_in_fp32,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return out


@jit
def _rms_norm_rows_kernel(
    x_ptr,
    rows_ptr,
    weight_ptr,
    out_ptr,
    count,
    width,
    x_stride,
    rows_stride,
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
    values = tl.load(x_ptr + (source * x_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0)
    normed = rms_normed(values, weight, width, eps, offset, MULTIPLY_IN_FP32)
    tl.store(out_ptr + (compact * width)[:, None] + columns[None, :], normed, mask=inside)


@jit
def rms_normed(values, weight, width, eps, offset, MULTIPLY_IN_FP32: tl.constexpr):
    """RMSNorm of a tile of rows (zeros beyond ``width``), in the dtype of ``values``."""
    wide = values.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1) / width
    normed = wide * tl.rsqrt(mean_square + eps)[:, None]
    if not MULTIPLY_IN_FP32:
        normed = normed.to(values.dtype).to(tl.float32)
    return (normed * (offset + weight.to(tl.float32))[None, :]).to(values.dtype)

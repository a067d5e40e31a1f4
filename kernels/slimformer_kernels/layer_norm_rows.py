"""LayerNorm of selected rows: the gather costs nothing, because the norm reads rows by index."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_matrix, check_positive, check_rows, check_vector
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .row_tiles import WIDEST_NORM_ROW, row_count, row_programs, row_tile


def layer_norm_rows(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """LayerNorm of ``x[rows]``, returned compact; ``x`` is read by index and never copied.

    Computes ``(x - mean) * rsqrt(variance + eps) * weight + bias`` in float32, rounded once, with the biased
    variance of ``torch.nn.LayerNorm`` (arXiv 1607.06450).

    Args:
        x: ``[tokens, hidden]``; rows may be strided, the last dimension is contiguous.
        rows: ``[kept]`` int64 or int32 row indices, sorted and unique; None for all rows.
        weight: ``[hidden]``.
        bias: ``[hidden]`` or None.
        eps: added to the variance; positive.

    Returns:
        ``[kept, hidden]`` in ``x.dtype``, contiguous. Differentiable through the reference: the kernel runs
        only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit; with ``set_debug(True)`` also when
            ``rows`` is unsorted, has repeats or points outside ``x``.

    Example:
        >>> x = torch.tensor([[1.0, 3.0], [5.0, 5.0], [2.0, 8.0]])
        >>> layer_norm_rows(x, torch.tensor([0, 2]), torch.ones(2), torch.full((2,), 10.0))
        tensor([[ 9.0000, 11.0000],
                [ 9.0000, 11.0000]])
    """
    check_matrix("x", x)
    check_rows(rows, x)
    check_vector("weight", weight, x)
    if bias is not None:
        check_vector("bias", bias, x)
    check_positive("eps", eps)
    if runs_kernel(x, weight, bias) and x.shape[1] <= WIDEST_NORM_ROW:
        return layer_norm_rows_op(x, rows, weight, bias, eps)
    return layer_norm_rows_reference(x, rows, weight, bias, eps)


def layer_norm_rows_reference(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """``layer_norm_rows`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    compute = torch.promote_types(x.dtype, torch.float32)
    kept = (x if rows is None else x.index_select(0, rows)).to(compute)
    shift = None if bias is None else bias.to(compute)
    return F.layer_norm(kept, (x.shape[1],), weight.to(compute), shift, eps).to(x.dtype)


@kernel_op("layer_norm_rows")
def layer_norm_rows_op(
    x: Tensor, rows: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    count, width = row_count(x, rows), int(x.shape[1])
    tile = row_tile(width, widest=WIDEST_NORM_ROW)
    out = x.new_empty((count, width))
    with torch.cuda.device_of(x):
        wrap_triton(_layer_norm_rows_kernel)[(row_programs(count, tile),)](
            x,
            rows,
            weight,
            bias,
            out,
            count,
            width,
            x.stride(0),
            0 if rows is None else rows.stride(0),
            eps,
            HAS_ROWS=rows is not None,
            HAS_BIAS=bias is not None,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return out


@jit
def _layer_norm_rows_kernel(
    x_ptr,
    rows_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    count,
    width,
    x_stride,
    rows_stride,
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
    values = tl.load(x_ptr + (source * x_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    normed = layer_normed(values, weight_ptr, bias_ptr, columns, width, eps, HAS_BIAS)
    tl.store(out_ptr + (compact * width)[:, None] + columns[None, :], normed, mask=inside)


@jit
def layer_normed(values, weight_ptr, bias_ptr, columns, width, eps, HAS_BIAS: tl.constexpr):
    """LayerNorm of a tile of rows (zeros beyond ``width``), in the dtype of ``values``."""
    wide = values.to(tl.float32)
    mean = tl.sum(wide, axis=1) / width
    # Two passes over registers cost nothing and lose no digits where the mean is large.
    centred = tl.where((columns < width)[None, :], wide - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, axis=1) / width
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)
    normed = centred * tl.rsqrt(variance + eps)[:, None] * weight[None, :]
    if HAS_BIAS:
        normed += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    return normed.to(values.dtype)

"""A router's score of every row: RMSNorm and the product with one vector, in one pass over the residual."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_matrix, check_positive, check_vector
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .rms_norm_rows import rms_norm_rows_reference, rms_normed
from .row_tiles import WIDEST_NORM_ROW, row_programs, row_tile


def router_scores(
    x: Tensor,
    weight: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    *,
    offset: float = 0.0,
    multiply_in_fp32: bool | None = None,
) -> Tensor:
    """``rms_norm(x) . router + bias`` in float32, without writing the norm (MoD, arXiv 2404.02258).

    The norm is rounded to ``x.dtype`` as ``rms_norm_rows`` rounds it, and the product is taken in float32: a score
    is the same whether the norm was written or not.

    Args:
        x: ``[rows, hidden]``; rows may be strided, the last dimension is contiguous.
        weight: ``[hidden]``, the norm's.
        eps: added to the mean square; positive.
        router: ``[hidden]``.
        bias: ``[1]``.
        offset: as in ``rms_norm_rows``.
        multiply_in_fp32: as in ``rms_norm_rows``.

    Returns:
        ``[rows]`` float32. Differentiable through the reference: the kernel runs only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit.

    Example:
        >>> x = torch.tensor([[3.0, 4.0], [6.0, 8.0]])
        >>> router_scores(x, torch.ones(2), 1e-6, torch.tensor([5.0, 0.0]), torch.tensor([-1.0]))
        tensor([3.2426, 3.2426])
    """
    check_matrix("x", x)
    check_vector("weight", weight, x)
    check_vector("router", router, x)
    check_positive("eps", eps)
    if multiply_in_fp32 is None:
        multiply_in_fp32 = offset != 0.0
    if runs_kernel(x, weight, router, bias) and x.shape[1] <= WIDEST_NORM_ROW:
        return router_scores_op(x, weight, eps, router, bias, offset, multiply_in_fp32)
    return router_scores_reference(x, weight, eps, router, bias, offset, multiply_in_fp32)


def router_scores_reference(
    x: Tensor,
    weight: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    offset: float,
    multiply_in_fp32: bool,
) -> Tensor:
    """``router_scores`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    h = rms_norm_rows_reference(x, None, weight, eps, offset, multiply_in_fp32)
    return (h.float() * router.float()).sum(-1) + bias.float()


@kernel_op("router_scores")
def router_scores_op(
    x: Tensor,
    weight: Tensor,
    eps: float,
    router: Tensor,
    bias: Tensor,
    offset: float,
    multiply_in_fp32: bool,
) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    count, width = x.shape[0], int(x.shape[1])
    tile = row_tile(width, widest=WIDEST_NORM_ROW)
    out = x.new_empty((count,), dtype=torch.float32)
    with torch.cuda.device_of(x):
        wrap_triton(_router_scores_kernel)[(row_programs(count, tile),)](
            x,
            weight,
            router,
            bias,
            out,
            count,
            width,
            x.stride(0),
            eps,
            offset,
            MULTIPLY_IN_FP32=multiply_in_fp32,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return out


@jit
def _router_scores_kernel(
    x_ptr,
    weight_ptr,
    router_ptr,
    bias_ptr,
    out_ptr,
    count,
    width,
    x_stride,
    eps,
    offset,
    MULTIPLY_IN_FP32: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # int64: tokens x hidden passes 2**31 at 512k tokens of 4096.
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < count
    columns = tl.arange(0, BLOCK_COLUMNS)
    real = columns < width
    inside = exists[:, None] & real[None, :]
    values = tl.load(x_ptr + (row * x_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    weight = tl.load(weight_ptr + columns, mask=real, other=0.0)
    router = tl.load(router_ptr + columns, mask=real, other=0.0).to(tl.float32)
    normed = rms_normed(values, weight, width, eps, offset, MULTIPLY_IN_FP32)
    score = tl.sum(normed.to(tl.float32) * router[None, :], axis=1) + tl.load(bias_ptr).to(tl.float32)
    tl.store(out_ptr + row, score, mask=exists)

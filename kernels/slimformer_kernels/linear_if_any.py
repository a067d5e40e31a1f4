"""A linear layer of a few rows that reads no weight where no row wants it: decided on the device."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_device, check_dtype, check_last_stride, check_matrix, check_shape
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .errors import KernelArgumentError

# More rows than this are rarely all unwanted, and matrix units are faster from there on.
MOST_ROWS = 4
_BLOCK_OUT, _BLOCK_IN, _WARPS = 16, 512, 4


def linear_if_any(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor) -> Tensor:
    """``x @ weight.T + bias`` at the wanted rows and zeros at the others, for a decode step of a few sequences.

    Such a product takes as long as its weight takes to be read. Where no row is wanted, nothing is read, and the host
    need not know.

    Args:
        x: ``[rows, in]`` with at most 4 rows, last dimension contiguous.
        weight: ``[out, in]``, last dimension contiguous.
        bias: ``[out]``, or None.
        wanted: bool ``[rows]``.

    Returns:
        ``[rows, out]`` in ``x.dtype``; sums are taken in float32. Differentiable through the reference: the kernel
        runs only where no gradient is needed.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit, or there are more rows.

    Example:
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> linear_if_any(x, torch.ones(1, 2), None, torch.tensor([True, False]))
        tensor([[3.],
                [0.]])
    """
    check_matrix("x", x)
    check_matrix("weight", weight)
    check_shape("weight", weight, (weight.shape[0], x.shape[1]), "as wide as x")
    check_dtype("weight", weight, x, "x")
    check_device("weight", weight, x, "x")
    check_last_stride("weight", weight)
    check_shape("wanted", wanted, (x.shape[0],), "one per row")
    if wanted.dtype != torch.bool:
        raise KernelArgumentError(f"wanted must be bool, got {wanted.dtype}")
    if x.shape[0] > MOST_ROWS:
        raise KernelArgumentError(
            f"x must have at most {MOST_ROWS} rows, got {x.shape[0]}: compute all rows of more with F.linear"
        )
    if runs_kernel(x, weight, bias) and x.shape[0]:
        return linear_if_any_op(x, weight, bias, wanted)
    return linear_if_any_reference(x, weight, bias, wanted)


def linear_if_any_reference(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor) -> Tensor:
    """``linear_if_any`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    if not bool(wanted.any()):
        return x.new_zeros(x.shape[0], weight.shape[0])
    return F.linear(x, weight, bias) * wanted[:, None]


@kernel_op("linear_if_any")
def linear_if_any_op(x: Tensor, weight: Tensor, bias: Tensor | None, wanted: Tensor) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    rows, width, out = x.shape[0], int(x.shape[1]), weight.shape[0]
    y = x.new_empty((rows, out))
    with torch.cuda.device_of(x):
        wrap_triton(_linear_if_any_kernel)[((out + _BLOCK_OUT - 1) // _BLOCK_OUT,)](
            x,
            weight,
            bias,
            wanted,
            y,
            rows,
            width,
            out,
            x.stride(0),
            weight.stride(0),
            wanted.stride(0),
            HAS_BIAS=bias is not None,
            ROWS=1 << (rows - 1).bit_length(),
            BLOCK_OUT=_BLOCK_OUT,
            BLOCK_IN=_BLOCK_IN,
            num_warps=_WARPS,
        )
    return y


@jit
def _linear_if_any_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    wanted_ptr,
    y_ptr,
    rows,
    width,
    out,
    x_stride,
    weight_stride,
    wanted_stride,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    wanted = tl.load(wanted_ptr + row * wanted_stride, mask=row < rows, other=0).to(tl.int32)
    column = tl.program_id(0).to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    exists = column < out
    total = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
    # No turn at all where no row is wanted.
    end = tl.where(tl.max(wanted, axis=0) > 0, width, 0)
    for start in range(0, end, BLOCK_IN):
        inner = start + tl.arange(0, BLOCK_IN)
        inside = inner < width
        w = tl.load(
            weight_ptr + (column * weight_stride)[:, None] + inner[None, :],
            mask=exists[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        x = tl.load(
            x_ptr + (row * x_stride)[:, None] + inner[None, :],
            mask=(wanted > 0)[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        total += tl.sum(x[:, None, :] * w[None, :, :], axis=2)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)
        total += bias[None, :] * (wanted > 0).to(tl.float32)[:, None]
    where = (row.to(tl.int64) * out)[:, None] + column[None, :]
    tl.store(y_ptr + where, total.to(y_ptr.dtype.element_ty), mask=(row < rows)[:, None] & exists[None, :])

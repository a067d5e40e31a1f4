"""Linear layers of a decode step's few rows: the norm in front, and what comes behind, in the launch that reads them.

Such a product takes as long as its weight takes to be read, and a launch of its own for a norm, an activation or an
addition as long again as a small weight.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import check_choice, check_device, check_dtype, check_last_stride, check_matrix, check_shape
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .errors import KernelArgumentError
from .glu import activated, glu_reference
from .rms_norm_rows import rms_norm_rows_reference

# Tensor cores multiply so many rows in the time of one; beyond, the weights are no longer all that takes time.
MOST_ROWS = 16
MOST_LAYERS = 3
_ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


class InputNorm(NamedTuple):
    """An RMSNorm in front of a layer, as ``rms_norm_rows`` takes it; products are rounded once."""

    weight: Tensor
    eps: float
    offset: float = 0.0


class Tiling(NamedTuple):
    """How a product is cut: outputs and inputs of a tile, tiles on their way at once, and warps."""

    out: int
    inner: int
    stages: int = 3
    warps: int = 4


def step_linear(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None]], norm: InputNorm | None = None
) -> Tensor:
    """Up to three linear layers of the same few rows, whose outputs lie side by side.

    Args:
        x: ``[rows, in]`` with at most 16 rows, last dimension contiguous.
        layers: Weights ``[out, in]``, last dimension contiguous, and biases ``[out]`` or None.
        norm: What ``x`` goes through first; None for nothing.

    Returns:
        ``[rows, sum of outs]`` in ``x.dtype``; sums are taken in float32. Differentiable through the reference.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit, or there are more rows or layers.

    Example:
        >>> step_linear(torch.tensor([[1.0, 2.0]]), [(torch.ones(1, 2), None), (torch.eye(2), torch.ones(2))])
        tensor([[3., 2., 3.]])
    """
    if not 0 < len(layers) <= MOST_LAYERS:
        raise KernelArgumentError(f"layers must be 1 to {MOST_LAYERS}, got {len(layers)}")
    for weight, bias in layers:
        _check(x, weight, bias, norm)
    (w0, b0), (w1, b1), (w2, b2) = [*layers, (None, None), (None, None)][:3]
    own, eps, offset = (None, 0.0, 0.0) if norm is None else norm
    given = (x, own, eps, offset, w0, b0, w1, b1, w2, b2)
    if w0 is not None and runs_kernel(x, w0) and len(x):
        found: Tensor = step_linear_op(*given)
        return found
    return step_linear_reference(*given)


def step_gated(x: Tensor, gate: Tensor, up: Tensor, activation: str, norm: InputNorm | None = None) -> Tensor:
    """The activation of one linear layer times another one, of the same few rows.

    Args:
        x: ``[rows, in]`` with at most 16 rows, last dimension contiguous.
        gate: ``[out, in]``, last dimension contiguous.
        up: The same.
        activation: ``"silu"``, ``"gelu_tanh"`` or ``"gelu"``.
        norm: What ``x`` goes through first; None for nothing.

    Returns:
        ``[rows, out]`` in ``x.dtype``. Differentiable through the reference.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit, or there are more rows.

    Example:
        >>> step_gated(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 2.0]]), "silu")
        tensor([[1.4621]])
    """
    check_choice("activation", activation, _ACTIVATIONS)
    for weight in (gate, up):
        _check(x, weight, None, norm)
    check_shape("up", up, gate.shape, "the shape of gate")
    own, eps, offset = (None, 0.0, 0.0) if norm is None else norm
    if runs_kernel(x, gate, up) and len(x):
        found: Tensor = step_gated_op(x, own, eps, offset, gate, up, activation)
        return found
    return step_gated_reference(x, own, eps, offset, gate, up, activation)


def step_linear_add_(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Add a linear layer of a few rows to the residual, in place.

    Args:
        residual: ``[rows, out]``, changed in place, last dimension contiguous.
        x: ``[rows, in]`` with at most 16 rows, last dimension contiguous.
        weight: ``[out, in]``, last dimension contiguous.
        bias: ``[out]``, or None.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit, or there are more rows.

    Example:
        >>> residual = torch.ones(1, 1)
        >>> step_linear_add_(residual, torch.tensor([[1.0, 2.0]]), torch.ones(1, 2))
        >>> residual
        tensor([[4.]])
    """
    _check(x, weight, bias, None)
    check_shape("residual", residual, (len(x), len(weight)), "one output per row")
    check_dtype("residual", residual, x, "x")
    check_device("residual", residual, x, "x")
    check_last_stride("residual", residual)
    if runs_kernel(x, weight, residual) and len(x):
        step_linear_add_op(residual, x, weight, bias)
    else:
        residual.add_(F.linear(x, weight, bias))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, norm: InputNorm | None) -> None:
    check_matrix("x", x)
    check_matrix("weight", weight)
    check_shape("weight", weight, (weight.shape[0], x.shape[1]), "as wide as x")
    for name, tensor, length in (
        ("weight", weight, None),
        ("bias", bias, weight.shape[0]),
        ("norm", None if norm is None else norm.weight, x.shape[1]),
    ):
        if tensor is None:
            continue
        check_dtype(name, tensor, x, "x")
        check_device(name, tensor, x, "x")
        check_last_stride(name, tensor)
        if length is not None:
            check_shape(name, tensor, (length,), "one number per channel")
    if x.shape[0] > MOST_ROWS:
        raise KernelArgumentError(
            f"x must have at most {MOST_ROWS} rows, got {x.shape[0]}: compute more with F.linear"
        )


def _normed(x: Tensor, norm: Tensor | None, eps: float, offset: float) -> Tensor:
    return x if norm is None else rms_norm_rows_reference(x, None, norm, eps, offset, True)


def step_linear_reference(
    x: Tensor, norm: Tensor | None, eps: float, offset: float, *layers: Tensor | None
) -> Tensor:
    """``step_linear`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    h = _normed(x, norm, eps, offset)
    pairs = zip(layers[::2], layers[1::2], strict=True)
    return torch.cat([F.linear(h, weight, bias) for weight, bias in pairs if weight is not None], dim=1)


def step_gated_reference(
    x: Tensor, norm: Tensor | None, eps: float, offset: float, gate: Tensor, up: Tensor, activation: str
) -> Tensor:
    """``step_gated`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    h = _normed(x, norm, eps, offset)
    return glu_reference(F.linear(h, gate), F.linear(h, up), activation)


@kernel_op("step_linear")
def step_linear_op(
    x: Tensor,
    norm: Tensor | None,
    eps: float,
    offset: float,
    w0: Tensor,
    b0: Tensor | None,
    w1: Tensor | None,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    layers = [(w0, b0), (w1, b1), (w2, b2)]
    total = sum(int(w.shape[0]) for w, _ in layers if w is not None)
    out = x.new_empty((x.shape[0], total))
    launch_layers(x, norm, eps, offset, layers, out, False, _tiling(len(x), total))
    return out


@kernel_op("step_linear_add_", mutates=("residual",))
def step_linear_add_op(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Launch the kernel; the arguments have been checked."""
    layers = [(weight, bias), (None, None), (None, None)]
    launch_layers(x, None, 0.0, 0.0, layers, residual, True, _tiling(len(x), int(weight.shape[0])))


def launch_layers(x, norm, eps, offset, layers, out, adds, tiling):
    """Write the layers of ``x``, or add the first, to ``out``; the arguments have been checked."""
    rows, width = x.shape[0], int(x.shape[1])
    (w0, b0), (w1, b1), (w2, b2) = layers
    outs = [0 if w is None else int(w.shape[0]) for w, _ in layers]
    blocks = [-(-n // tiling.out) for n in outs]
    with torch.cuda.device_of(x):
        # fmt: off
        wrap_triton(_step_linear_kernel)[(sum(blocks),)](
            x, norm, w0, b0, w1, b1, w2, b2, out,
            rows, width, *outs, blocks[0], blocks[0] + blocks[1],
            x.stride(0), w0.stride(0), 0 if w1 is None else w1.stride(0), 0 if w2 is None else w2.stride(0),
            out.stride(0), eps, offset,
            HAS_NORM=norm is not None,
            BIAS_0=b0 is not None, BIAS_1=b1 is not None, BIAS_2=b2 is not None,
            LAYERS=sum(n > 0 for n in outs),
            ADDS=adds,
            ROWS=_padded(rows),
            BLOCK_OUT=tiling.out,
            BLOCK_IN=tiling.inner,
            STAGES=tiling.stages,
            num_warps=tiling.warps,
        )
        # fmt: on


@kernel_op("step_gated")
def step_gated_op(
    x: Tensor, norm: Tensor | None, eps: float, offset: float, gate: Tensor, up: Tensor, activation: str
) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    # Two weights are read at once.
    tiling = _tiling(len(x), 2 * int(gate.shape[0]))
    tiling = tiling._replace(out=tiling.out // 2 if len(x) == 1 else 16)
    return launch_gated(x, norm, eps, offset, gate, up, activation, tiling)


def launch_gated(x, norm, eps, offset, gate, up, activation, tiling):
    """``step_gated``; the arguments have been checked."""
    rows, width, out = x.shape[0], int(x.shape[1]), int(gate.shape[0])
    y = x.new_empty((rows, out))
    with torch.cuda.device_of(x):
        wrap_triton(_step_gated_kernel)[(-(-out // tiling.out),)](
            x,
            norm,
            gate,
            up,
            y,
            rows,
            width,
            out,
            x.stride(0),
            gate.stride(0),
            up.stride(0),
            eps,
            offset,
            HAS_NORM=norm is not None,
            ACTIVATION=activation,
            ROWS=_padded(rows),
            BLOCK_OUT=tiling.out,
            BLOCK_IN=tiling.inner,
            STAGES=tiling.stages,
            num_warps=tiling.warps,
        )
    return y


def _padded(rows: int) -> int:
    """One row is multiplied number by number; more as a tile of a matrix product."""
    return 1 if rows == 1 else MOST_ROWS


def _tiling(rows: int, out: int) -> Tiling:
    """As many programs as keep all of a GPU reading, of as few tiles as that allows."""
    if rows > 1:
        return Tiling(16 if out < 8192 else 32, 128, stages=4)
    return Tiling(4 if out < 4096 else 8, 512)


@jit
def _products(
    x_ptr, norm_ptr, weight_ptr, up_ptr, block, rows, width, out, x_stride, weight_stride, up_stride, eps, offset,
    HAS_NORM: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Products with a block of one weight, and with the same of another where it is gated, ``[ROWS, BLOCK_OUT]``."""
    # int64: vocabulary x hidden passes 2**31. Rows that are none read the last one again.
    column = tl.minimum(block.to(tl.int64) * BLOCK_OUT + tl.arange(0, BLOCK_OUT), out - 1)
    weight_rows = weight_ptr + (column * weight_stride)[:, None]
    up_rows = up_ptr + (column * up_stride)[:, None]
    if ROWS == 1:
        wide = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
        wide_up = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
        squares = tl.zeros((BLOCK_IN,), tl.float32)
        for start in tl.range(0, width, BLOCK_IN, num_stages=STAGES):
            inner = start + tl.arange(0, BLOCK_IN)
            inside = inner < width
            x = tl.load(x_ptr + inner, mask=inside, other=0.0).to(tl.float32)
            if HAS_NORM:
                squares += x * x
                x *= tl.load(norm_ptr + inner, mask=inside, other=0.0).to(tl.float32) + offset
            weight = tl.load(weight_rows + inner[None, :], mask=inside[None, :], other=0.0)
            wide += weight.to(tl.float32) * x[None, :]
            if GATED:
                up = tl.load(up_rows + inner[None, :], mask=inside[None, :], other=0.0)
                wide_up += up.to(tl.float32) * x[None, :]
        factor = 1.0
        if HAS_NORM:
            # Behind the product, so that nothing waits for the length of the row.
            factor = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
        total = (tl.sum(wide, axis=1) * factor)[None, :]
        total_up = (tl.sum(wide_up, axis=1) * factor)[None, :]
    else:
        row = tl.arange(0, ROWS)
        x_rows = x_ptr + (tl.minimum(row, rows - 1).to(tl.int64) * x_stride)[:, None]
        factors = tl.full((ROWS,), 1.0, tl.float32)
        if HAS_NORM:
            row_squares = tl.zeros((ROWS, BLOCK_IN), tl.float32)
            for start in range(0, width, BLOCK_IN):
                inner = start + tl.arange(0, BLOCK_IN)
                x = tl.load(x_rows + inner[None, :], mask=(inner < width)[None, :], other=0.0).to(tl.float32)
                row_squares += x * x
            factors = tl.rsqrt(tl.sum(row_squares, axis=1) / width + eps)
        total = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
        total_up = tl.zeros((ROWS, BLOCK_OUT), tl.float32)
        for start in tl.range(0, width, BLOCK_IN, num_stages=STAGES):
            inner = start + tl.arange(0, BLOCK_IN)
            inside = (inner < width)[None, :]
            x = tl.load(x_rows + inner[None, :], mask=inside, other=0.0)
            if HAS_NORM:
                norm = tl.load(norm_ptr + inner, mask=inner < width, other=0.0).to(tl.float32) + offset
                x = (x.to(tl.float32) * factors[:, None] * norm[None, :]).to(x.dtype)
            weight = tl.load(weight_rows + inner[None, :], mask=inside, other=0.0)
            # "ieee": TF32 would cost float32 inputs half their digits; half precision ignores it.
            total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
            if GATED:
                up = tl.load(up_rows + inner[None, :], mask=inside, other=0.0)
                total_up = tl.dot(x, tl.trans(up), total_up, input_precision="ieee")
    return total, total_up


@jit
def _step_linear_block(
    x_ptr, norm_ptr, weight_ptr, bias_ptr, out_ptr, block, rows, width, out, x_stride, weight_stride, out_stride, eps,
    offset, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    total, _ = _products(
        x_ptr, norm_ptr, weight_ptr, weight_ptr, block, rows, width, out, x_stride, weight_stride, weight_stride, eps,
        offset, HAS_NORM, False, ROWS, BLOCK_OUT, BLOCK_IN, STAGES,
    )  # fmt: skip
    column = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    exists = column < out
    if HAS_BIAS:
        total += tl.load(bias_ptr + column, mask=exists, other=0.0).to(tl.float32)[None, :]
    row = tl.arange(0, ROWS)
    where = out_ptr + (row.to(tl.int64) * out_stride)[:, None] + column[None, :]
    inside = (row < rows)[:, None] & exists[None, :]
    if ADDS:
        total += tl.load(where, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _step_linear_kernel(
    x_ptr, norm_ptr, w0_ptr, b0_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, out_ptr,
    rows, width, out_0, out_1, out_2, end_0, end_1,
    x_stride, w0_stride, w1_stride, w2_stride, out_stride, eps, offset,
    HAS_NORM: tl.constexpr, BIAS_0: tl.constexpr, BIAS_1: tl.constexpr, BIAS_2: tl.constexpr, LAYERS: tl.constexpr,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    # Not one condition: what is known when it is compiled leaves no branch.
    if LAYERS == 1:  # noqa: SIM114
        _step_linear_block(
            x_ptr, norm_ptr, w0_ptr, b0_ptr, out_ptr, block, rows, width, out_0, x_stride, w0_stride, out_stride, eps,
            offset, HAS_NORM, BIAS_0, ADDS, ROWS, BLOCK_OUT, BLOCK_IN, STAGES,
        )  # fmt: skip
    elif block < end_0:
        _step_linear_block(
            x_ptr, norm_ptr, w0_ptr, b0_ptr, out_ptr, block, rows, width, out_0, x_stride, w0_stride, out_stride, eps,
            offset, HAS_NORM, BIAS_0, ADDS, ROWS, BLOCK_OUT, BLOCK_IN, STAGES,
        )  # fmt: skip
    elif (LAYERS == 2) | (block < end_1):
        _step_linear_block(
            x_ptr, norm_ptr, w1_ptr, b1_ptr, out_ptr + out_0, block - end_0, rows, width, out_1, x_stride, w1_stride,
            out_stride, eps, offset, HAS_NORM, BIAS_1, ADDS, ROWS, BLOCK_OUT, BLOCK_IN, STAGES,
        )  # fmt: skip
    else:
        if LAYERS == 3:
            _step_linear_block(
                x_ptr, norm_ptr, w2_ptr, b2_ptr, out_ptr + out_0 + out_1, block - end_1, rows, width, out_2, x_stride,
                w2_stride, out_stride, eps, offset, HAS_NORM, BIAS_2, ADDS, ROWS, BLOCK_OUT, BLOCK_IN, STAGES,
            )  # fmt: skip


@jit
def _step_gated_kernel(
    x_ptr, norm_ptr, gate_ptr, up_ptr, out_ptr, rows, width, out, x_stride, gate_stride, up_stride, eps, offset,
    HAS_NORM: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    gate, up = _products(
        x_ptr, norm_ptr, gate_ptr, up_ptr, block, rows, width, out, x_stride, gate_stride, up_stride, eps, offset,
        HAS_NORM, True, ROWS, BLOCK_OUT, BLOCK_IN, STAGES,
    )  # fmt: skip
    column = block * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, ROWS)
    where = out_ptr + (row.to(tl.int64) * out)[:, None] + column[None, :]
    product = activated(gate, ACTIVATION) * up
    tl.store(
        where, product.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (column < out)[None, :]
    )

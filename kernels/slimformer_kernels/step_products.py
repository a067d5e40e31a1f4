"""The kernels of ``step_linear``: products of a few rows with weights that are read once, and how they are cut."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch

from .dispatch import jit, tl, wrap_triton
from .glu import activated

# Tensor cores multiply so many rows in the time of one; beyond, the weights are no longer all that takes time.
MOST_ROWS = 16


class Tiling(NamedTuple):
    """How a product is cut: outputs and inputs of a tile, tiles on their way at once, and warps."""

    out: int
    inner: int
    stages: int = 3
    warps: int = 4


def tiling_for(rows: int, out: int) -> Tiling:
    """As many programs as keep all of a GPU reading, of as few tiles as that allows."""
    if rows > 1:
        return Tiling(16 if out < 8192 else 32, 128, stages=4)
    return Tiling(4 if out < 4096 else 8, 512)


def launch_layers(x, norm, eps, offset, layers, out, residual, tiling):
    """Write the layers of ``x``, to which a residual may be added, to ``out``; the arguments have been checked."""
    rows, width = x.shape[0], int(x.shape[1])
    (w0, b0), (w1, b1), (w2, b2) = layers
    outs = [0 if w is None else int(w.shape[0]) for w, _ in layers]
    blocks = [-(-n // tiling.out) for n in outs]
    with torch.cuda.device_of(x):
        # fmt: off
        wrap_triton(_step_linear_kernel)[(sum(blocks),)](
            x, norm, w0, b0, w1, b1, w2, b2, residual, out,
            rows, width, *outs, blocks[0], blocks[0] + blocks[1],
            x.stride(0), w0.stride(0), 0 if w1 is None else w1.stride(0), 0 if w2 is None else w2.stride(0),
            0 if residual is None else residual.stride(0), out.stride(0), eps, offset,
            HAS_NORM=norm is not None,
            BIAS_0=b0 is not None, BIAS_1=b1 is not None, BIAS_2=b2 is not None,
            LAYERS=sum(n > 0 for n in outs),
            ADDS=residual is not None,
            ROWS=_padded(rows),
            BLOCK_OUT=tiling.out,
            BLOCK_IN=tiling.inner,
            STAGES=tiling.stages,
            num_warps=tiling.warps,
        )
        # fmt: on


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
    x_ptr, norm_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, block, rows, width, out, x_stride, weight_stride,
    residual_stride, out_stride, eps, offset, HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, ADDS: tl.constexpr,
    ROWS: tl.constexpr,    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
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
        residual = residual_ptr + (row.to(tl.int64) * residual_stride)[:, None] + column[None, :]
        total += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    tl.store(where, total.to(out_ptr.dtype.element_ty), mask=inside)


@jit
def _step_linear_kernel(
    x_ptr, norm_ptr, w0_ptr, b0_ptr, w1_ptr, b1_ptr, w2_ptr, b2_ptr, residual_ptr, out_ptr,
    rows, width, out_0, out_1, out_2, end_0, end_1,
    x_stride, w0_stride, w1_stride, w2_stride, residual_stride, out_stride, eps, offset,
    HAS_NORM: tl.constexpr, BIAS_0: tl.constexpr, BIAS_1: tl.constexpr, BIAS_2: tl.constexpr, LAYERS: tl.constexpr,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    # Not one condition: what is known when it is compiled leaves no branch.
    if LAYERS == 1:  # noqa: SIM114
        _step_linear_block(
            x_ptr, norm_ptr, w0_ptr, b0_ptr, residual_ptr, out_ptr, block, rows, width, out_0, x_stride, w0_stride,
            residual_stride, out_stride, eps, offset, HAS_NORM, BIAS_0, ADDS, ROWS, BLOCK_OUT, BLOCK_IN, STAGES,
        )  # fmt: skip
    elif block < end_0:
        _step_linear_block(
            x_ptr, norm_ptr, w0_ptr, b0_ptr, residual_ptr, out_ptr, block, rows, width, out_0, x_stride, w0_stride,
            residual_stride, out_stride, eps, offset, HAS_NORM, BIAS_0, ADDS, ROWS, BLOCK_OUT, BLOCK_IN, STAGES,
        )  # fmt: skip
    elif (LAYERS == 2) | (block < end_1):
        _step_linear_block(
            x_ptr, norm_ptr, w1_ptr, b1_ptr, residual_ptr, out_ptr + out_0, block - end_0, rows, width, out_1,
            x_stride, w1_stride, residual_stride, out_stride, eps, offset, HAS_NORM, BIAS_1, ADDS, ROWS, BLOCK_OUT,
            BLOCK_IN, STAGES,
        )  # fmt: skip
    else:
        if LAYERS == 3:
            _step_linear_block(
                x_ptr, norm_ptr, w2_ptr, b2_ptr, residual_ptr, out_ptr + out_0 + out_1, block - end_1, rows, width,
                out_2, x_stride, w2_stride, residual_stride, out_stride, eps, offset, HAS_NORM, BIAS_2, ADDS, ROWS,
                BLOCK_OUT, BLOCK_IN, STAGES,
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

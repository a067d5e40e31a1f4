"""The gated activations of an MLP, SwiGLU and GEGLU, in one pass over the output of the gate_up product."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    check_choice,
    check_device,
    check_dtype,
    check_even,
    check_floating,
    check_last_stride,
    check_shape,
)
from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .row_tiles import row_programs, row_tile

# Elementwise work: wide rows are cut into pieces that fill 8 warps.
_WIDEST_PIECE = 4096


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (SwiGLU, arXiv 2002.05202).

    ``silu`` is computed in float32 and rounded to the input dtype before the product, as eager model code
    does, so that results agree with ``F.silu(gate) * up``.

    Args:
        gate: ``[..., intermediate]``, last dimension contiguous. Two halves of one packed tensor are read
            where they lie, without a copy.
        up: same shape and dtype.

    Returns:
        The same shape and dtype, contiguous. Differentiable through the reference: the kernel runs only where
        no gradient is needed.

    Raises:
        KernelArgumentError: shapes, dtypes or devices differ, or a last dimension is not contiguous.

    Example:
        >>> swiglu(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 2.0]]))
        tensor([[0.0000, 1.4621]])
    """
    return _glu(gate, up, "silu")


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """``gelu(gate) * up`` (GEGLU, arXiv 2002.05202).

    ``gelu`` is computed in float32 and rounded to the input dtype before the product, as eager model code
    does, so that results agree with ``F.gelu(gate, approximate=approximate) * up``.

    Args:
        gate: ``[..., intermediate]``, last dimension contiguous. Two halves of one packed tensor are read
            where they lie, without a copy.
        up: same shape and dtype.
        approximate: ``"tanh"`` (Gemma and most others) or ``"none"`` for the exact error function.

    Returns:
        The same shape and dtype, contiguous. Differentiable through the reference: the kernel runs only where
        no gradient is needed.

    Raises:
        KernelArgumentError: shapes, dtypes or devices differ, a last dimension is not contiguous, or
            ``approximate`` is unknown.

    Example:
        >>> geglu(torch.tensor([[0.0, 1.0]]), torch.tensor([[5.0, 2.0]]))
        tensor([[0.0000, 1.6824]])
    """
    check_choice("approximate", approximate, ("tanh", "none"))
    return _glu(gate, up, "gelu_tanh" if approximate == "tanh" else "gelu")


def swiglu_packed(gate_up: Tensor) -> Tensor:
    """``swiglu`` on one packed ``[..., 2 * intermediate]`` tensor, gate first.

    Raises:
        KernelArgumentError: the last dimension is odd, or as in ``swiglu``.

    Example:
        >>> swiglu_packed(torch.tensor([[0.0, 1.0, 5.0, 2.0]]))
        tensor([[0.0000, 1.4621]])
    """
    check_even("gate_up", gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return swiglu(gate, up)


def geglu_packed(gate_up: Tensor, *, approximate: str = "tanh") -> Tensor:
    """``geglu`` on one packed ``[..., 2 * intermediate]`` tensor, gate first.

    Raises:
        KernelArgumentError: the last dimension is odd, or as in ``geglu``.

    Example:
        >>> geglu_packed(torch.tensor([[0.0, 1.0, 5.0, 2.0]]))
        tensor([[0.0000, 1.6824]])
    """
    check_even("gate_up", gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return geglu(gate, up, approximate=approximate)


def glu_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The gated product in plain PyTorch: what runs without Triton, and what the kernel is tested against.

    ``activation`` is ``"silu"``, ``"gelu_tanh"`` or ``"gelu"``.
    """
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


@kernel_op("glu")
def glu_op(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Launch the kernel on two ``[n, intermediate]`` matrices; the arguments have been checked."""
    count, width = gate.shape[0], int(gate.shape[1])
    tile = row_tile(width, widest=_WIDEST_PIECE)
    pieces = (width + tile.columns - 1) // tile.columns
    out = gate.new_empty((count, width))
    with torch.cuda.device_of(gate):
        wrap_triton(_glu_kernel)[(row_programs(count, tile), pieces)](
            gate,
            up,
            out,
            count,
            width,
            gate.stride(0),
            up.stride(0),
            ACTIVATION=activation,
            BLOCK_ROWS=tile.rows,
            BLOCK_COLUMNS=tile.columns,
            num_warps=tile.warps,
        )
    return out


def _glu(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    check_floating("gate", gate)
    check_shape("up", up, gate.shape, "the shape of gate")
    check_dtype("up", up, gate, "gate")
    check_device("up", up, gate, "gate")
    check_last_stride("gate", gate)
    check_last_stride("up", up)
    if runs_kernel(gate, up) and gate.dim() > 0 and gate.shape[-1] > 0:
        # Both halves of a packed tensor collapse to [n, intermediate] as views: nothing is copied.
        width = gate.shape[-1]
        return glu_op(gate.reshape(-1, width), up.reshape(-1, width), activation).view(gate.shape)
    return glu_reference(gate, up, activation)


@jit
def activated(wide, ACTIVATION: tl.constexpr):
    """The activation of float32 numbers."""
    if ACTIVATION == "silu":
        active = wide * tl.sigmoid(wide)
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2u), with 2 * sqrt(2 / pi) = 1.5957691216057308.
        active = wide * tl.sigmoid(1.5957691216057308 * (wide + 0.044715 * wide * wide * wide))
    else:
        active = 0.5 * wide * (1.0 + tl.erf(wide * 0.7071067811865476))
    return active


@jit
def _glu_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    count,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < count
    columns = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = exists[:, None] & (columns < width)[None, :]
    gate = tl.load(gate_ptr + (row * gate_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    up = tl.load(up_ptr + (row * up_stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    product = activated(gate.to(tl.float32), ACTIVATION).to(gate.dtype).to(tl.float32) * up.to(tl.float32)
    tl.store(out_ptr + (row * width)[:, None] + columns[None, :], product.to(gate.dtype), mask=inside)

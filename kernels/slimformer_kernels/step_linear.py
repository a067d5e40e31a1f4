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
from .dispatch import kernel_op, runs_kernel
from .errors import KernelArgumentError
from .glu import glu_reference
from .rms_norm_rows import rms_norm_rows_reference
from .step_products import MOST_ROWS, launch_gated, launch_layers, tiling_for

MOST_LAYERS = 3
_ACTIVATIONS = ("silu", "gelu_tanh", "gelu")


class InputNorm(NamedTuple):
    """An RMSNorm in front of a layer, as ``rms_norm_rows`` takes it; products are rounded once."""

    weight: Tensor
    eps: float
    offset: float = 0.0


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


def step_linear_added(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The residual plus a linear layer of a few rows.

    Args:
        residual: ``[rows, out]``, last dimension contiguous.
        x: ``[rows, in]`` with at most 16 rows, last dimension contiguous.
        weight: ``[out, in]``, last dimension contiguous.
        bias: ``[out]``, or None.

    Returns:
        ``[rows, out]`` in ``x.dtype``, rounded once. Differentiable through the reference.

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit, or there are more rows.

    Example:
        >>> step_linear_added(torch.ones(1, 1), torch.tensor([[1.0, 2.0]]), torch.ones(1, 2))
        tensor([[4.]])
    """
    _check(x, weight, bias, None)
    check_shape("residual", residual, (len(x), len(weight)), "one output per row")
    check_dtype("residual", residual, x, "x")
    check_device("residual", residual, x, "x")
    check_last_stride("residual", residual)
    if runs_kernel(x, weight, residual) and len(x):
        found: Tensor = step_linear_added_op(residual, x, weight, bias)
        return found
    return residual + F.linear(x, weight, bias)


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
    launch_layers(x, norm, eps, offset, layers, out, None, tiling_for(len(x), total))
    return out


@kernel_op("step_linear_added")
def step_linear_added_op(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    out = torch.empty_like(residual, memory_format=torch.contiguous_format)
    layers = [(weight, bias), (None, None), (None, None)]
    launch_layers(x, None, 0.0, 0.0, layers, out, residual, tiling_for(len(x), int(weight.shape[0])))
    return out


@kernel_op("step_gated")
def step_gated_op(
    x: Tensor, norm: Tensor | None, eps: float, offset: float, gate: Tensor, up: Tensor, activation: str
) -> Tensor:
    """Launch the kernel; the arguments have been checked."""
    # Two weights are read at once.
    tiling = tiling_for(len(x), 2 * int(gate.shape[0]))
    tiling = tiling._replace(out=tiling.out // 2 if len(x) == 1 else 16)
    return launch_gated(x, norm, eps, offset, gate, up, activation, tiling)

"""Checks of what callers pass: shapes, dtypes, devices and strides always, index values only when debugging.

The ordinary checks read metadata, so they never wait for the GPU. ``set_debug(True)`` or the environment
variable ``SLIMFORMER_DEBUG=1`` adds the checks that read values; they are left out while ``torch.compile``
traces.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import KernelArgumentError

_debug = os.environ.get("SLIMFORMER_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Turn the checks of index and label values on or off; each one waits for the GPU.

    Example:
        >>> set_debug(True)
        >>> debugging()
        True
        >>> set_debug(False)
    """
    global _debug
    _debug = bool(enabled)


def debugging() -> bool:
    """Say whether index and label values are to be checked in this call."""
    return _debug and not torch.compiler.is_compiling()


def check_floating(name: str, x: Tensor) -> None:
    """Raise unless ``x`` holds floating-point numbers."""
    if not x.dtype.is_floating_point:
        raise KernelArgumentError.of(
            f"{name} must hold floating-point numbers",
            got=x.dtype,
            allowed="float32, bfloat16, float16 (and float64, without a kernel)",
            remedy=f"convert {name} first",
        )


def check_device(name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    """Raise unless both tensors lie on one device."""
    if x.device != like.device:
        raise KernelArgumentError.of(
            f"{name} and {like_name} lie on different devices",
            got=f"{x.device} and {like.device}",
            allowed="one device",
            remedy=f"move {name} to {like.device}",
        )


def check_dtype(name: str, x: Tensor, like: Tensor, like_name: str) -> None:
    """Raise unless both tensors have one dtype."""
    if x.dtype != like.dtype:
        raise KernelArgumentError.of(
            f"{name} and {like_name} have different dtypes",
            got=f"{x.dtype} and {like.dtype}",
            allowed="one dtype",
            remedy=f"convert {name} to {like.dtype}",
        )


def check_shape(name: str, x: Tensor, shape: Sequence[int], meaning: str) -> None:
    """Raise unless ``x`` has exactly ``shape``, which ``meaning`` puts in words."""
    if x.shape != torch.Size(shape):
        raise KernelArgumentError.of(
            f"{name} has the wrong shape",
            got=tuple(x.shape),
            allowed=f"{tuple(shape)}, that is {meaning}",
            remedy=f"reshape {name} or pass the matching tensors",
        )


def check_last_stride(name: str, x: Tensor) -> None:
    """Raise unless neighbours in the last dimension are neighbours in memory."""
    if x.dim() > 0 and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise KernelArgumentError.of(
            f"the last dimension of {name} must be contiguous",
            got=f"strides {tuple(x.stride())}",
            allowed="a last stride of 1, any stride between rows",
            remedy=f"call {name}.contiguous() first",
        )


def check_even(name: str, x: Tensor) -> None:
    """Raise unless the last dimension of ``x`` splits into two halves."""
    if x.dim() == 0 or x.shape[-1] % 2:
        raise KernelArgumentError.of(
            f"{name} must hold a gate and an up half",
            got=f"shape {tuple(x.shape)}",
            allowed="[..., 2 * intermediate], gate first",
            remedy="concatenate the two projections along the last dimension",
        )


def check_matrix(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a floating-point ``[tokens, hidden]`` matrix with contiguous rows."""
    check_floating(name, x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise KernelArgumentError.of(
            f"{name} must be a matrix with at least one column",
            got=f"shape {tuple(x.shape)}",
            allowed="[tokens, hidden]",
            remedy=f"flatten batch and tokens: {name}.view(-1, {name}.shape[-1])",
        )
    check_last_stride(name, x)


def check_vector(name: str, vector: Tensor, x: Tensor) -> None:
    """Raise unless ``vector`` is a contiguous floating-point ``[hidden]`` that fits ``x``."""
    check_floating(name, vector)
    check_device(name, vector, x, "x")
    check_shape(name, vector, (x.shape[1],), "[hidden] of x")
    check_last_stride(name, vector)


def check_rows(rows: Tensor | None, x: Tensor) -> None:
    """Raise unless ``rows`` can index the rows of ``x``; sorted, unique and in range is a debug check."""
    if rows is None:
        return
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise KernelArgumentError.of(
            "rows must be a list of row indices",
            got=f"shape {tuple(rows.shape)}, {rows.dtype}",
            allowed="[kept] int64 or int32, sorted and unique; None for all rows",
            remedy="turn a boolean mask into indices with mask.nonzero().squeeze(1)",
        )
    check_device("rows", rows, x, "x")
    if debugging() and rows.numel():
        if bool((rows[1:] <= rows[:-1]).any()):
            raise KernelArgumentError.of(
                "rows must be strictly ascending",
                got=_excerpt(rows),
                allowed="sorted indices without repeats",
                remedy="call rows.unique()",
            )
        if int(rows[0]) < 0 or int(rows[-1]) >= x.shape[0]:
            raise KernelArgumentError.of(
                "rows points outside x",
                got=f"indices {int(rows[0])} to {int(rows[-1])}",
                allowed=f"0 to {x.shape[0] - 1}",
                remedy="count rows in the flattened [batch * tokens, hidden] tensor",
            )


def check_update(x: Tensor, rows: Tensor | None, y: Tensor) -> None:
    """Raise unless ``y [kept, hidden]`` can be added to the rows of ``x`` in place."""
    check_matrix("x", x)
    check_rows(rows, x)
    check_floating("y", y)
    check_device("y", y, x, "x")
    check_dtype("y", y, x, "x")
    kept = x.shape[0] if rows is None else rows.shape[0]
    check_shape("y", y, (kept, x.shape[1]), "[kept rows, hidden]")
    check_last_stride("y", y)
    if x.shape[0] > 1 and x.stride(0) < x.shape[1]:
        raise KernelArgumentError.of(
            "the rows of x share memory, so they cannot be updated in place",
            got=f"row stride {x.stride(0)} for {x.shape[1]} columns",
            allowed="a row stride of at least the number of columns",
            remedy="call x.contiguous() first",
        )


def check_positive(name: str, value: float) -> None:
    """Raise unless ``value`` is greater than zero."""
    if not value > 0:
        raise KernelArgumentError.of(
            f"{name} must be positive", got=value, allowed=f"{name} > 0", remedy=f"pass a larger {name}"
        )


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise KernelArgumentError.of(
            f"{name} is unknown",
            got=repr(value),
            allowed=" or ".join(map(repr, choices)),
            remedy="pass one of them",
        )


def _excerpt(values: Tensor) -> str:
    shown = ", ".join(str(v) for v in values[:8].tolist())
    return f"[{shown}{', …' if values.numel() > 8 else ''}]"

"""What a decode step does between its projections and its attention: norms and rotation of heads, and the cache."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .dispatch import jit, kernel_op, runs_kernel, tl, wrap_triton
from .errors import KernelArgumentError
from .rms_norm_rows import rms_norm_rows_reference
from .rotary import rotary_reference


class HeadNorms(NamedTuple):
    """RMSNorms over every head of queries and of keys, as ``rms_norm_rows`` takes them; products are rounded once."""

    query: Tensor
    key: Tensor
    eps: float
    offset: float = 0.0


def cache_rotary_(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    *,
    rotation: tuple[Tensor, Tensor] | None = None,
    interleaved: bool = False,
    norms: HeadNorms | None = None,
) -> None:
    """Norm and rotate queries in place, and keys on their way to their places in the cache, values beside them.

    Args:
        query: ``[batch * tokens, heads, head_dim]``, changed in place; any strides, last dimension contiguous.
        key: ``[batch * tokens, kv_heads, head_dim]``, likewise; left as it is.
        value: The same.
        keys: ``[batch, places, kv_heads, head_dim]``, where keys go; any strides, last dimension contiguous.
        values: The same.
        place: ``[tokens]`` int64, the place of every token's keys, the same for all of the batch.
        rotation: Cosines and sines ``[batch * tokens, rotary_dim]``, as ``rotary_`` takes them; None for none.
        interleaved: False pairs channel i with ``i + rotary_dim / 2``, True pairs neighbours.
        norms: What queries and keys go through first; None for nothing.

    Raises:
        KernelArgumentError: the shapes do not fit each other.

    Example:
        >>> query, key, value = torch.ones(1, 1, 2), torch.full((1, 1, 2), 2.0), torch.full((1, 1, 2), 3.0)
        >>> keys, values = torch.zeros(1, 3, 1, 2), torch.zeros(1, 3, 1, 2)
        >>> cache_rotary_(query, key, value, keys, values, torch.tensor([1]))
        >>> keys[0, :, 0].tolist(), values[0, :, 0].tolist()
        ([[0.0, 0.0], [2.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    """
    rows, _, width = key.shape
    batch, tokens = keys.shape[0], place.shape[0]
    fits = key.shape == value.shape and keys.shape == values.shape and rows == batch * tokens
    fits = fits and keys.shape[2:] == key.shape[1:] and (query.shape[0], query.shape[2]) == (rows, width)
    if not fits or (rotation is not None and rotation[0].shape[0] != rows):
        raise KernelArgumentError.of(
            "queries, keys, values and their cache do not fit each other",
            got=f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}, cache {tuple(keys.shape)}, "
            f"places {tuple(place.shape)}",
            allowed="[batch * tokens, heads, head_dim], twice [batch * tokens, kv_heads, head_dim], twice [batch, "
            "places, kv_heads, head_dim], [tokens]",
            remedy="Pass rows of whole texts, and the cache of these.",
        )
    cos, sin = (None, None) if rotation is None else rotation
    query_norm, key_norm, eps, offset = (None, None, 0.0, 0.0) if norms is None else norms
    given = (query, key, value, keys, values, place, cos, sin, interleaved, query_norm, key_norm, eps, offset)
    if runs_kernel(query, key, value, keys) and rows:
        cache_rotary_op(*given)
    else:
        cache_rotary_reference(*given)


def cache_rotary_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    offset: float,
) -> None:
    """``cache_rotary_`` in plain PyTorch: runs without Triton, and the kernel is tested against it."""
    turned = []
    for x, norm in ((query, query_norm), (key, key_norm)):
        if norm is not None:
            x = rms_norm_rows_reference(x, None, norm, eps, offset, True)
        if cos is not None and sin is not None:
            x = rotary_reference(x, cos, sin, None, interleaved)
        turned.append(x)
    if turned[0] is not query:
        query.copy_(turned[0])
    shape = (keys.shape[0], place.shape[0], *key.shape[1:])
    keys.index_copy_(1, place, turned[1].reshape(shape))
    values.index_copy_(1, place, value.reshape(shape))


@kernel_op("cache_rotary_", mutates=("query", "keys", "values"))
def cache_rotary_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    place: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    interleaved: bool,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    offset: float,
) -> None:
    """Launch the kernel, a program for every head of every row; the arguments have been checked."""
    rows, heads, width = (int(size) for size in query.shape)
    kv_heads = int(key.shape[1])
    with torch.cuda.device_of(query):
        # fmt: off
        wrap_triton(_cache_rotary_kernel)[(rows, heads + 2 * kv_heads)](
            query, key, value, keys, values, place, cos, sin, query_norm, key_norm,
            place.shape[0], heads, kv_heads, width, 0 if cos is None else int(cos.shape[1]),
            query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
            keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
            0 if cos is None else cos.stride(0), 0 if sin is None else sin.stride(0), eps, offset,
            ROTATES=cos is not None,
            NORMS=query_norm is not None,
            INTERLEAVED=interleaved,
            BLOCK_WIDTH=1 << (width - 1).bit_length(),
            # In one warp every channel is read before its partner is written over.
            num_warps=1,
        )
        # fmt: on


@jit
def _turned(
    from_ptr, to_ptr, norm_ptr, cos_ptr, sin_ptr, width, rotary, eps, offset,
    ROTATES: tl.constexpr, NORMS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """One head, normed and rotated, from where it is to where it goes."""
    column = tl.arange(0, BLOCK_WIDTH)
    inside = column < width
    x = tl.load(from_ptr + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0
    if NORMS:
        factor = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
    y = x
    if NORMS:
        y = x * factor * (tl.load(norm_ptr + column, mask=inside, other=0.0).to(tl.float32) + offset)
    if ROTATES:
        turns = column < rotary
        if INTERLEAVED:
            first = column % 2 == 0
            partner = tl.where(first, column + 1, column - 1)
        else:
            first = column < rotary // 2
            partner = tl.where(first, column + rotary // 2, column - rotary // 2)
        other = tl.load(from_ptr + partner, mask=turns, other=0.0).to(tl.float32)
        if NORMS:
            other = (
                other * factor * (tl.load(norm_ptr + partner, mask=turns, other=0.0).to(tl.float32) + offset)
            )
        cos = tl.load(cos_ptr + column, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + column, mask=turns, other=0.0).to(tl.float32)
        y = y * cos + tl.where(first, -other, other) * sin
    tl.debug_barrier()
    tl.store(to_ptr + column, y.to(to_ptr.dtype.element_ty), mask=inside)


@jit
def _cache_rotary_kernel(
    query_ptr, key_ptr, value_ptr, keys_ptr, values_ptr, place_ptr, cos_ptr, sin_ptr, query_norm_ptr, key_norm_ptr,
    tokens, heads, kv_heads, width, rotary,
    query_stride, query_stride_head, key_stride, key_stride_head, value_stride, value_stride_head,
    keys_stride_batch, keys_stride_place, keys_stride_head, values_stride_batch, values_stride_place,
    values_stride_head, cos_stride, sin_stride, eps, offset,
    ROTATES: tl.constexpr, NORMS: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    cos_row, sin_row = cos_ptr, sin_ptr
    if ROTATES:
        cos_row, sin_row = cos_ptr + row * cos_stride, sin_ptr + row * sin_stride
    if head < heads:
        if ROTATES or NORMS:
            own = query_ptr + row * query_stride + head * query_stride_head
            _turned(
                own, own, query_norm_ptr, cos_row, sin_row, width, rotary, eps, offset, ROTATES, NORMS, INTERLEAVED,
                BLOCK_WIDTH,
            )  # fmt: skip
    else:
        place = tl.load(place_ptr + row % tokens).to(tl.int64)
        batch = row // tokens
        if head < heads + kv_heads:
            of = (head - heads).to(tl.int64)
            _turned(
                key_ptr + row * key_stride + of * key_stride_head,
                keys_ptr + batch * keys_stride_batch + place * keys_stride_place + of * keys_stride_head,
                key_norm_ptr, cos_row, sin_row, width, rotary, eps, offset, ROTATES, NORMS, INTERLEAVED, BLOCK_WIDTH,
            )  # fmt: skip
        else:
            of = (head - heads - kv_heads).to(tl.int64)
            _turned(
                value_ptr + row * value_stride + of * value_stride_head,
                values_ptr + batch * values_stride_batch + place * values_stride_place + of * values_stride_head,
                key_norm_ptr, cos_row, sin_row, width, rotary, eps, offset, False, False, INTERLEAVED, BLOCK_WIDTH,
            )  # fmt: skip

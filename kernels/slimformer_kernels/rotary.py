"""Rotary position embedding of queries and keys where they lie: read once, written once, in one launch."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
from torch import Tensor

from .arguments import check_device, check_dtype, check_floating, check_last_stride, check_shape, debugging
from .dispatch import KERNEL_DTYPES, jit, kernel_op, runs_kernel, tl, wrap_triton
from .errors import KernelArgumentError

# Per program and half: 16 elements per thread at 4 warps, two 16-byte accesses in bfloat16.
_TILE_ELEMENTS = 2048
_ELEMENTS_PER_WARP = 512


def rotary_(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    *,
    rows: Tensor | None = None,
    interleaved: bool = False,
) -> None:
    """Rotate queries and keys by their positions, in place (RoPE, arXiv 2104.09864).

    Computes ``x * cos + rotate_half(x) * sin`` in float32, rounded once, with each channel's own cosine and
    sine, as transformers' ``apply_rotary_pos_emb`` does. Channels beyond ``rotary_dim`` stay as they are.

    Meant for inference. Where gradients flow, autograd records the update like any in-place operation;
    callers that need the input afterwards take ``rotary_reference``, which is out of place.

    Args:
        query: ``[tokens, heads, head_dim]``, changed in place; any strides, last dimension contiguous.
        key: ``[tokens, kv_heads, head_dim]`` in ``query.dtype``, changed in place; None for queries alone.
            Must not overlap ``query``; both may be views of one packed projection.
        cos: ``[positions, rotary_dim]``, both halves filled; ``rotary_dim`` is even and at most ``head_dim``.
        sin: the same shape and dtype as ``cos``.
        rows: ``[tokens]`` int64 or int32, the row of ``cos`` and ``sin`` that belongs to each token; None
            when token i has row i.
        interleaved: False pairs channel i with ``i + rotary_dim / 2`` (Llama), True pairs neighbours (GPT-J).

    Raises:
        KernelArgumentError: a shape, dtype, device or stride does not fit; with ``set_debug(True)`` also when
            ``rows`` points outside ``cos``.

    Example:
        >>> query = torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]])
        >>> cos, sin = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
        >>> rotary_(query, None, cos, sin)
        >>> query
        tensor([[[ 1.,  2.]],
        <BLANKLINE>
                [[-4.,  3.]]])
    """
    _check(query, key, cos, sin, rows)
    if runs_kernel(query, key, cos, sin) and cos.dtype in KERNEL_DTYPES:
        rotary_op(query, key, cos, sin, rows, interleaved)
        return
    for x in (query, key):
        if x is not None:
            x.copy_(rotary_reference(x, cos, sin, rows, interleaved))


def rotary_reference(
    x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None = None, interleaved: bool = False
) -> Tensor:
    """``rotary_`` of one tensor in plain PyTorch, out of place and differentiable.

    Runs without Triton; the kernel is tested against it, and callers that need gradients use it.
    """
    width = cos.shape[-1]
    compute = torch.promote_types(x.dtype, torch.float32)
    if rows is None:
        cos, sin = cos[: x.shape[0]], sin[: x.shape[0]]
    else:
        cos, sin = cos.index_select(0, rows), sin.index_select(0, rows)
    cos, sin = cos.to(compute)[:, None], sin.to(compute)[:, None]
    wide = x[..., :width].to(compute)
    if interleaved:
        turned = torch.stack((-wide[..., 1::2], wide[..., ::2]), dim=-1).flatten(-2)
    else:
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    rotated = (wide * cos + turned * sin).to(x.dtype)
    return rotated if width == x.shape[-1] else torch.cat((rotated, x[..., width:]), dim=-1)


@kernel_op("rotary_", mutates=("query", "key"))
def rotary_op(
    query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, rows: Tensor | None, interleaved: bool
) -> None:
    """Launch the kernel; the arguments have been checked."""
    tokens, heads, half = query.shape[0], int(query.shape[1]), int(cos.shape[1]) // 2
    kv_heads = 0 if key is None else int(key.shape[1])
    block_half = _power_of_two(half)
    tiles = -(-max(heads, kv_heads) * block_half // _TILE_ELEMENTS)
    block_heads, block_kv_heads = _power_of_two(-(-heads // tiles)), _power_of_two(-(-kv_heads // tiles))
    with torch.cuda.device_of(query):
        # One program to spare: an empty launch needs no branch on the token count.
        wrap_triton(_rotary_kernel)[(tokens + 1, tiles)](
            query,
            key,
            cos,
            sin,
            rows,
            tokens,
            heads,
            kv_heads,
            half,
            query.stride(0),
            query.stride(1),
            0 if key is None else key.stride(0),
            0 if key is None else key.stride(1),
            cos.stride(0),
            sin.stride(0),
            0 if rows is None else rows.stride(0),
            HAS_KEY=key is not None,
            HAS_ROWS=rows is not None,
            INTERLEAVED=interleaved,
            BLOCK_HEADS=block_heads,
            BLOCK_KV_HEADS=block_kv_heads,
            BLOCK_HALF=block_half,
            num_warps=min(max(block_heads * block_half // _ELEMENTS_PER_WARP, 1), 16),
        )


@jit
def _rotary_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    rows_ptr,
    tokens,
    heads,
    kv_heads,
    half,
    query_stride_token,
    query_stride_head,
    key_stride_token,
    key_stride_head,
    cos_stride,
    sin_stride,
    rows_stride,
    HAS_KEY: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    # int64: tokens x hidden passes 2**31 at 512k tokens of 4096.
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    if token < tokens:
        row = token
        if HAS_ROWS:
            row = tl.load(rows_ptr + token * rows_stride).to(tl.int64)
        query_heads = tile * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        query_offsets = token * query_stride_token + query_heads.to(tl.int64) * query_stride_head
        if HAS_KEY:
            key_heads = tile * BLOCK_KV_HEADS + tl.arange(0, BLOCK_KV_HEADS)
            key_offsets = token * key_stride_token + key_heads.to(tl.int64) * key_stride_head
        # Queries and keys are loaded before either is stored: no load may move across a store.
        if INTERLEAVED:
            columns = tl.arange(0, 2 * BLOCK_HALF)
            inside = columns < 2 * half
            cos = tl.load(cos_ptr + row * cos_stride + columns, mask=inside, other=0.0).to(tl.float32)
            sin = tl.load(sin_ptr + row * sin_stride + columns, mask=inside, other=0.0).to(tl.float32)
            query_tile = query_ptr + query_offsets[:, None] + columns[None, :]
            query_inside = (query_heads < heads)[:, None] & inside[None, :]
            query = tl.load(query_tile, mask=query_inside, other=0.0)
            if HAS_KEY:
                key_tile = key_ptr + key_offsets[:, None] + columns[None, :]
                key_inside = (key_heads < kv_heads)[:, None] & inside[None, :]
                key = tl.load(key_tile, mask=key_inside, other=0.0)
                turned = _rotated_pairs(key, cos, sin, BLOCK_KV_HEADS, BLOCK_HALF)
                tl.store(key_tile, turned, mask=key_inside)
            tl.store(query_tile, _rotated_pairs(query, cos, sin, BLOCK_HEADS, BLOCK_HALF), mask=query_inside)
        else:
            columns = tl.arange(0, BLOCK_HALF)
            inside = columns < half
            cos_row, sin_row = cos_ptr + row * cos_stride + columns, sin_ptr + row * sin_stride + columns
            cos_low = tl.load(cos_row, mask=inside, other=0.0).to(tl.float32)
            sin_low = tl.load(sin_row, mask=inside, other=0.0).to(tl.float32)
            cos_high = tl.load(cos_row + half, mask=inside, other=0.0).to(tl.float32)
            sin_high = tl.load(sin_row + half, mask=inside, other=0.0).to(tl.float32)
            query_tile = query_ptr + query_offsets[:, None] + columns[None, :]
            query_inside = (query_heads < heads)[:, None] & inside[None, :]
            query_low = tl.load(query_tile, mask=query_inside, other=0.0)
            query_high = tl.load(query_tile + half, mask=query_inside, other=0.0)
            if HAS_KEY:
                key_tile = key_ptr + key_offsets[:, None] + columns[None, :]
                key_inside = (key_heads < kv_heads)[:, None] & inside[None, :]
                key_low = tl.load(key_tile, mask=key_inside, other=0.0)
                key_high = tl.load(key_tile + half, mask=key_inside, other=0.0)
                tl.store(key_tile, _rotated(key_low, key_high, cos_low, -sin_low), mask=key_inside)
                tl.store(key_tile + half, _rotated(key_high, key_low, cos_high, sin_high), mask=key_inside)
            tl.store(query_tile, _rotated(query_low, query_high, cos_low, -sin_low), mask=query_inside)
            tl.store(
                query_tile + half, _rotated(query_high, query_low, cos_high, sin_high), mask=query_inside
            )


@jit
def _rotated(x, turned, cos, sin):
    """``x * cos + turned * sin``, rounded once to the dtype of ``x``."""
    return (x.to(tl.float32) * cos[None, :] + turned.to(tl.float32) * sin[None, :]).to(x.dtype)


@jit
def _rotated_pairs(x, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr):
    """Rotate neighbours of a ``[HEADS, 2 * HALF]`` tile, in the dtype of ``x``."""
    # Whole rows are read, so that accesses stay wide; the pairs part in registers.
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (HEADS, HALF, 2)))
    cos_even, cos_odd = tl.split(tl.reshape(cos, (HALF, 2)))
    sin_even, sin_odd = tl.split(tl.reshape(sin, (HALF, 2)))
    low = even * cos_even[None, :] - odd * sin_even[None, :]
    high = odd * cos_odd[None, :] + even * sin_odd[None, :]
    return tl.reshape(tl.join(low, high), (HEADS, 2 * HALF)).to(x.dtype)


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size`` and 1."""
    return 1 << (max(size, 1) - 1).bit_length()


def _check(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, rows: Tensor | None) -> None:
    for name, x in (("query", query), ("key", key)):
        if x is None:
            continue
        check_floating(name, x)
        if x.dim() != 3 or 0 in x.shape[1:]:
            raise KernelArgumentError.of(
                f"{name} must have three dimensions",
                got=f"shape {tuple(x.shape)}",
                allowed="[tokens, heads, head_dim]",
                remedy=f"split {name} into heads and flatten batch and tokens",
            )
        check_last_stride(name, x)
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise KernelArgumentError.of(
                f"{name} is changed in place, but its elements share memory",
                got=f"strides {tuple(x.stride())}",
                allowed="a tensor of its own or a view without repeats",
                remedy=f"call {name}.contiguous() first",
            )
    if key is not None:
        check_dtype("key", key, query, "query")
        check_device("key", key, query, "query")
        shape = (query.shape[0], key.shape[1], query.shape[2])
        check_shape("key", key, shape, "[tokens, kv_heads, head_dim]")
    check_floating("cos", cos)
    if cos.dim() != 2 or cos.shape[1] % 2 or not 0 < cos.shape[1] <= query.shape[2]:
        raise KernelArgumentError.of(
            "cos does not fit query",
            got=f"shape {tuple(cos.shape)}",
            allowed=f"[positions, rotary_dim], rotary_dim even and at most {query.shape[2]}",
            remedy="flatten batch and tokens, and repeat the angles for the second half of the channels",
        )
    check_shape("sin", sin, cos.shape, "the shape of cos")
    check_dtype("sin", sin, cos, "cos")
    for name, table in (("cos", cos), ("sin", sin)):
        check_device(name, table, query, "query")
        check_last_stride(name, table)
    if rows is None:
        if cos.shape[0] < query.shape[0]:
            raise KernelArgumentError.of(
                "cos has too few rows",
                got=cos.shape[0],
                allowed=f"at least {query.shape[0]}, one per token",
                remedy="pass rows, the row of cos that belongs to each token",
            )
        return
    if rows.dim() != 1 or rows.dtype not in (torch.int64, torch.int32):
        raise KernelArgumentError.of(
            "rows must be a list of row indices",
            got=f"shape {tuple(rows.shape)}, {rows.dtype}",
            allowed="[tokens] int64 or int32",
            remedy="pass the flattened position ids",
        )
    check_shape("rows", rows, (query.shape[0],), "[tokens] of query")
    check_device("rows", rows, query, "query")
    if debugging() and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < cos.shape[0]:
        raise KernelArgumentError.of(
            "rows points outside cos",
            got=f"indices {int(rows.min())} to {int(rows.max())}",
            allowed=f"0 to {cos.shape[0] - 1}",
            remedy="compute cos and sin for all positions",
        )

"""Attention scores pooled into blocks, without ever holding the token by token score matrix."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    check_device,
    check_dtype,
    check_floating,
    check_last_stride,
    check_positive,
    check_shape,
)
from .dispatch import jit, kernel_op, runs_kernel, tl, triton, wrap_triton
from .errors import KernelArgumentError

# Above this head width two float32 tiles of 64 tokens no longer fit into shared memory side by side.
_WIDEST_HEAD = 256
_KERNEL_BLOCKS = (16, 32, 64)


class PooledScores(NamedTuple):
    """Scores of blocks of tokens, in float32.

    Attributes:
        tokens: ``[batch, blocks]``, how much the queries of the sequence attend to each block of keys: the
            sum of ``matrix`` over query blocks.
        matrix: ``[batch, query blocks, key blocks]``.
    """

    tokens: Tensor
    matrix: Tensor


def pooled_scores(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    block: int = 64,
) -> PooledScores:
    """Block scores of LeMo (arXiv 2501.09767): tile maxima of the mean over heads of ``relu(q . k * scale)``.

    Pairs of tokens that the causal mask or ``mask`` forbids count as zero, so a tile without any allowed pair
    scores zero. No gradient flows: these are scores and training targets. The kernel keeps one tile of scores
    at a time; the reference keeps ``[batch, heads, block, tokens]``.

    Args:
        q: ``[batch, heads, tokens, head_dim]``; any strides, last dimension contiguous.
        k: ``[batch, kv_heads, tokens, head_dim]``; ``heads`` is a multiple of ``kv_heads``.
        scale: factor on the products, positive; None means ``head_dim ** -0.5``.
        causal: whether a query sees only the keys up to its own position.
        mask: ``[batch, tokens]`` bool, True at real tokens; for left or right padding. Blocks are counted
            from position 0 of the padded sequence.
        block: tokens in a block; the last block may be shorter. The kernel takes 16, 32 and 64 (and head
            widths up to 256), the reference anything.

    Returns:
        ``PooledScores(tokens, matrix)``.

    Raises:
        KernelArgumentError: a shape, dtype, device, stride or number does not fit.

    Example:
        >>> q = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 4, 1)
        >>> pooled_scores(q, torch.ones(1, 1, 4, 1), scale=1.0, block=2)
        PooledScores(tokens=tensor([[6., 4.]]), matrix=tensor([[[2., 0.],
                 [4., 4.]]]))
    """
    _check(q, k, mask, block)
    if scale is None:
        scale = float(q.shape[-1]) ** -0.5
    check_positive("scale", scale)
    q, k = q.detach(), k.detach()
    if runs_kernel(q, k) and block in _KERNEL_BLOCKS and q.shape[-1] <= _WIDEST_HEAD:
        matrix = pooled_scores_op(q, k, scale, causal, mask, block)
    else:
        matrix = pooled_scores_reference(q, k, scale, causal, mask, block)
    return PooledScores(matrix.sum(1), matrix)


def pooled_scores_reference(
    q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None, block: int
) -> Tensor:
    """The block matrix in plain PyTorch, one query block at a time.

    This runs without Triton, and the kernel is tested against it.
    """
    batch, heads, tokens, width = q.shape
    kv_heads, blocks = k.shape[1], (tokens + block - 1) // block
    padding = blocks * block - tokens
    q, k = (F.pad(t.float(), (0, 0, 0, padding)) for t in (q, k))
    real = q.new_ones((batch, tokens), dtype=torch.bool) if mask is None else mask
    real = F.pad(real, (0, padding))
    position = torch.arange(blocks * block, device=q.device)
    matrix = q.new_zeros((batch, blocks, blocks))
    for m in range(blocks):
        tile = slice(m * block, (m + 1) * block)
        grouped = q[:, :, tile].reshape(batch, kv_heads, heads // kv_heads * block, width)
        scores = (grouped @ k.mT * scale).relu().view(batch, heads, block, blocks * block).mean(1)
        allowed = real[:, tile, None] & real[:, None, :]
        if causal:
            allowed = allowed & (position[None, :] <= position[tile, None])
        matrix[:, m] = scores.masked_fill(~allowed, 0.0).view(batch, block, blocks, block).amax((1, 3))
    return matrix


@kernel_op("pooled_scores")
def pooled_scores_op(
    q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None, block: int
) -> Tensor:
    """Launch the kernel for the block matrix; the arguments have been checked."""
    batch, heads, tokens, width = q.shape
    kv_heads, blocks = k.shape[1], (tokens + block - 1) // block
    block_width = max(16, triton.next_power_of_2(int(width)))
    out = q.new_empty((batch, blocks, blocks), dtype=torch.float32)
    with torch.cuda.device_of(q):
        # Neighbouring programs share a query block, so that it is read from L2.
        wrap_triton(_pooled_scores_kernel)[(blocks, blocks, batch)](
            q,
            k,
            mask,
            out,
            tokens,
            width,
            q.stride(0),
            q.stride(1),
            q.stride(2),
            k.stride(0),
            k.stride(1),
            k.stride(2),
            0 if mask is None else mask.stride(0),
            0 if mask is None else mask.stride(1),
            scale / heads,
            CAUSAL=causal,
            HAS_MASK=mask is not None,
            KV_HEADS=kv_heads,
            GROUP=heads // kv_heads,
            BLOCK=block,
            BLOCK_WIDTH=block_width,
            num_warps=4,
            # A second stage of float32 tiles 256 wide would pass the shared memory of one SM.
            num_stages=2 if block_width * q.element_size() <= 512 else 1,
        )
    return out


@jit
def _pooled_scores_kernel(
    q_ptr,
    k_ptr,
    mask_ptr,
    out_ptr,
    tokens,
    width,
    q_stride_batch,
    q_stride_head,
    q_stride_token,
    k_stride_batch,
    k_stride_head,
    k_stride_token,
    mask_stride_batch,
    mask_stride_token,
    scale,
    CAUSAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    key_block = tl.program_id(0)
    query_block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    blocks = tl.num_programs(0)
    queries = query_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    keys = key_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_WIDTH)
    q_inside = (queries < tokens)[:, None] & (columns < width)[None, :]
    k_inside = (keys < tokens)[None, :] & (columns < width)[:, None]
    q_tile = q_ptr + batch * q_stride_batch + (queries * q_stride_token)[:, None] + columns[None, :]
    k_tile = k_ptr + batch * k_stride_batch + (keys * k_stride_token)[None, :] + columns[:, None]

    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    # A tile above the diagonal computes nothing and stores its zero.
    if (key_block <= query_block) | (not CAUSAL):
        for _ in range(KV_HEADS):
            k = tl.load(k_tile, mask=k_inside, other=0.0)
            for _ in range(GROUP):
                q = tl.load(q_tile, mask=q_inside, other=0.0)
                # "ieee": TF32 would cost float32 inputs half their digits; half precision ignores it.
                total += tl.maximum(tl.dot(q, k, input_precision="ieee"), 0.0)
                q_tile += q_stride_head
            k_tile += k_stride_head

    allowed = (queries < tokens)[:, None] & (keys < tokens)[None, :]
    if CAUSAL:
        allowed &= keys[None, :] <= queries[:, None]
    if HAS_MASK:
        row = mask_ptr + batch * mask_stride_batch
        allowed &= tl.load(row + queries * mask_stride_token, mask=queries < tokens, other=0).to(tl.int1)[
            :, None
        ]
        allowed &= tl.load(row + keys * mask_stride_token, mask=keys < tokens, other=0).to(tl.int1)[None, :]
    # The scale is positive, so it commutes with relu and max.
    score = tl.max(tl.max(tl.where(allowed, total, 0.0), axis=1), axis=0) * scale
    tl.store(out_ptr + (batch * blocks + query_block) * blocks + key_block, score)


def _check(q: Tensor, k: Tensor, mask: Tensor | None, block: int) -> None:
    check_floating("q", q)
    for name, tensor in (("q", q), ("k", k)):
        if tensor.dim() != 4 or 0 in tensor.shape:
            raise KernelArgumentError.of(
                f"{name} must have four dimensions, none of them empty",
                got=f"shape {tuple(tensor.shape)}",
                allowed="[batch, heads, tokens, head_dim]",
                remedy=f"split {name} into heads first",
            )
        check_last_stride(name, tensor)
    check_dtype("k", k, q, "q")
    check_device("k", k, q, "q")
    check_shape(
        "k", k, (q.shape[0], k.shape[1], q.shape[2], q.shape[3]), "[batch, kv_heads, tokens, head_dim]"
    )
    if q.shape[1] % k.shape[1]:
        raise KernelArgumentError.of(
            "the heads of q must be a multiple of the heads of k",
            got=f"{q.shape[1]} and {k.shape[1]}",
            allowed="heads = group * kv_heads",
            remedy="pass the tensors as the attention layer holds them",
        )
    if mask is not None:
        check_shape("mask", mask, (q.shape[0], q.shape[2]), "[batch, tokens]")
        check_device("mask", mask, q, "q")
        if mask.dtype != torch.bool:
            raise KernelArgumentError.of(
                "mask must be bool",
                got=mask.dtype,
                allowed="torch.bool, True at real tokens",
                remedy="call mask.bool()",
            )
    if block < 1:
        raise KernelArgumentError.of(
            "block must be positive",
            got=block,
            allowed="at least 1, 64 by default",
            remedy="pass a larger block",
        )

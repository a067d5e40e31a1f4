"""Pooled attention scores: the kernel against its reference, and the reference against the whole matrix."""

from __future__ import annotations

import pytest
import torch

from slimformer_kernels import pooled_scores
from slimformer_kernels.pooled_scores import pooled_scores_op, pooled_scores_reference


@pytest.fixture
def dot_dtype(dtype, interpreted):
    """The dtypes whose products can be tested here."""
    if interpreted and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter multiplies the bit patterns of bfloat16")
    return dtype


def brute_force(q, k, scale, causal, mask, block):
    """The definition, on the materialised score matrix, with explicit loops over tiles."""
    batch, heads, tokens, _ = q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    scores = (q.double() @ k.double().mT * scale).clamp(min=0).mean(1)
    allowed = torch.ones(batch, tokens, tokens, dtype=torch.bool)
    if causal:
        allowed &= torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if mask is not None:
        allowed &= mask[:, :, None] & mask[:, None, :]
    scores = scores * allowed
    starts = range(0, tokens, block)
    return torch.stack(
        [
            torch.stack([scores[:, m : m + block, n : n + block].amax((1, 2)) for n in starts], dim=1)
            for m in starts
        ],
        dim=1,
    )


def padding(side, batch, tokens):
    """A [batch, tokens] mask whose rows lose ever more tokens on one side."""
    if side is None:
        return None
    position = torch.arange(tokens).expand(batch, tokens)
    lost = torch.arange(batch)[:, None] * (tokens // 3)
    return position >= lost if side == "left" else position < tokens - lost


@pytest.mark.full(2)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
def test_reference_is_the_definition(heads, kv_heads, causal, side):
    q, k = torch.randn(3, heads, 45, 12), torch.randn(3, kv_heads, 45, 12)
    mask = padding(side, 3, 45)
    tokens, matrix = pooled_scores(q, k, scale=0.3, causal=causal, mask=mask, block=8)
    expected = brute_force(q, k, 0.3, causal, mask, 8)
    torch.testing.assert_close(matrix.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tokens.double(), expected.sum(1), rtol=1e-5, atol=1e-6)


@pytest.mark.full(2)
@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "width", "block"),
    [(1, 1, 1, 16, 64), (4, 2, 130, 40, 64), (2, 2, 64, 8, 64), (3, 1, 50, 20, 16)],
)
def test_kernel_matches_the_reference(
    heads, kv_heads, tokens, width, block, causal, side, device, dot_dtype, poisoned, check_close
):
    q = torch.randn(2, heads, tokens, width, device=device).to(dot_dtype)
    k = torch.randn(2, kv_heads, tokens, width, device=device).to(dot_dtype)
    mask = padding(side, 2, tokens)
    mask = None if mask is None else mask.to(device)
    with poisoned():
        got = pooled_scores_op(q, k, 0.2, causal, mask, block)
    check_close(got, pooled_scores_reference(q, k, 0.2, causal, mask, block))


def test_kernel_reads_heads_where_the_projection_left_them(device, poisoned, check_close):
    """HuggingFace holds q and k as transposed views of [batch, tokens, heads, width]."""
    q = torch.randn(1, 70, 4, 32, device=device).transpose(1, 2)
    k = torch.randn(1, 70, 2, 32, device=device).transpose(1, 2)
    with poisoned():
        got = pooled_scores_op(q, k, 1.0, True, None, 64)
    check_close(got, pooled_scores_reference(q, k, 1.0, True, None, 64))


def test_widest_head_fits(device, dot_dtype, check_close):
    q, k = torch.randn(2, 1, 1, 70, 256, device=device).to(dot_dtype)
    check_close(
        pooled_scores_op(q, k, 1.0, True, None, 64), pooled_scores_reference(q, k, 1.0, True, None, 64)
    )


def test_no_gradient_flows():
    q = torch.randn(1, 1, 4, 4, requires_grad=True)
    assert not pooled_scores(q, q).matrix.requires_grad


def test_default_scale_is_that_of_attention():
    q, k = torch.randn(2, 1, 2, 9, 16)
    assert torch.equal(pooled_scores(q, k).matrix, pooled_scores(q, k, scale=0.25).matrix)

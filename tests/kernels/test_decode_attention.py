"""Attention of one new query of every text, over cached keys with room behind them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from slimformer_kernels import KernelArgumentError, decode_attention
from slimformer_kernels.decode_attention import decode_attention_op, decode_attention_reference

SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "places", "window", "softcap"),
    [(4, 2, 16, 200, None, None), (12, 2, 24, 700, None, None), (3, 3, 64, 65, 20, None),
     (20, 1, 16, 130, None, 5.0), (8, 8, 160, 90, 64, 30.0)],
)  # fmt: skip


@pytest.fixture
def dot_dtype(dtype, interpreted):
    """The dtypes whose products can be tested here."""
    if interpreted and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply bfloat16")
    return dtype


def case(heads, kv_heads, width, places, device="cpu", dtype=torch.float32, batch=3, tokens=1):
    """As a cache has them: [batch, kv_heads, places, width], seen the other way round."""
    key, value = (torch.randn(batch, kv_heads, places, width).to(device, dtype) for _ in range(2))
    query = torch.randn(batch * tokens, heads, width).to(device, dtype)
    return query, key.transpose(1, 2), value.transpose(1, 2)


def ranges_of(places: int) -> list[Tensor]:
    """Whole caches, one key, none, and texts that begin behind padding."""
    return [
        torch.tensor([[0, places], [0, 1], [21, 64]]),
        torch.tensor([[0, places - 1], [5, places // 2], [0, 0]]),
    ]


def leave_behind(key: Tensor, value: Tensor, ranges: Tensor) -> tuple[Tensor, Tensor]:
    """What lies behind the keys may be anything that was there before."""
    key, value = key.clone(), value.clone()
    for text, (_, end) in enumerate(ranges.tolist()):
        key[text, end:], value[text, end:] = float("nan"), float("nan")
    return key, value


def one_by_one(query, key, value, ranges, scale, window, softcap):
    """The definition, head by head in float64."""
    out = torch.zeros_like(query, dtype=torch.float64)
    tokens = len(query) // len(key)
    for row, head in itertools.product(range(len(query)), range(query.shape[1])):
        text = row // tokens
        start, end = ranges[text].tolist()
        end -= tokens - 1 - row % tokens
        first = start if window is None else max(start, end - window)
        if end <= first:
            continue
        of = head // (query.shape[1] // key.shape[2])
        scores = key[text, first:end, of].double() @ query[row, head].double() * scale
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        out[row, head] = scores.softmax(0) @ value[text, first:end, of].double()
    return out


TOKENS = pytest.mark.parametrize("tokens", [1, 2, 5, 12])


@TOKENS
@SHAPES
def test_reference_is_the_definition(heads, kv_heads, width, places, window, softcap, tokens):
    query, key, value = case(heads, kv_heads, width, places, tokens=tokens)
    for ranges in ranges_of(places):
        given = query, *leave_behind(key, value, ranges), ranges, width**-0.5, window, softcap
        found, expected = decode_attention_reference(*given), one_by_one(*given)
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.full(2)
@TOKENS
@SHAPES
def test_kernel_gives_what_the_reference_gives(
    heads, kv_heads, width, places, window, softcap, tokens, device, dot_dtype, poisoned, check_close
):
    query, key, value = case(heads, kv_heads, width, places, device, dot_dtype, tokens=tokens)
    counters = torch.zeros(3 * kv_heads, dtype=torch.int32, device=device)
    for ranges in ranges_of(places):
        given = query, *leave_behind(key, value, ranges), ranges.to(device), width**-0.5, window, softcap
        with poisoned():
            found = decode_attention_op(*given, counters)
        wide = (t.float() for t in given[:3])
        check_close(found, decode_attention_reference(*wide, *given[3:]).to(dot_dtype))
        assert not counters.any()


def test_long_caches_on_a_gpu(gpu, check_close):
    query, key, value = case(12, 2, 128, 20_000, gpu, torch.bfloat16)
    ranges = torch.tensor([[0, 20_000], [7, 16_385], [0, 300]], device=gpu)
    found = decode_attention(query, key, value, ranges, scale=128**-0.5)
    wide = query.float(), key.float(), value.float()
    check_close(found, decode_attention(*wide, ranges, scale=128**-0.5).bfloat16())


def test_what_does_not_fit_is_refused():
    query, key, value = case(4, 2, 16, 20)
    with pytest.raises(KernelArgumentError, match="do not fit"):
        decode_attention(query[:2], key, value, torch.zeros(3, 2, dtype=torch.int64), scale=1.0)

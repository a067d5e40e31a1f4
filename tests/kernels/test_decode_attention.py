"""Attention of one new query of every text, over cached keys with room behind them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimformer_kernels import KernelArgumentError, decode_attention
from slimformer_kernels.decode_attention import decode_attention_op, decode_attention_reference
from slimformer_kernels.dispatch import HAS_TRITON

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def case(heads: int, kv_heads: int, width: int, places: int, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads * width + places)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # As a cache has them: [batch, kv_heads, places, width].
    key, value = (noise(batch, kv_heads, places, width).transpose(1, 2) for _ in range(2))
    return noise(batch, heads, width), key, value


def by_hand(query: Tensor, key: Tensor, value: Tensor, ranges: Tensor, scale: float, window: int | None,
            softcap: float | None) -> Tensor:  # fmt: skip
    out = torch.zeros_like(query, dtype=torch.float64)
    for text, (start, end) in enumerate(ranges.tolist()):
        start = start if window is None else max(start, end - window)
        for head in range(query.shape[1] if end > start else 0):
            of = head // (query.shape[1] // key.shape[2])
            scores = key[text, start:end, of].double() @ query[text, head].double() * scale
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            out[text, head] = scores.softmax(0) @ value[text, start:end, of].double()
    return out


@pytest.mark.parametrize(
    "attend", [decode_attention_reference, pytest.param(decode_attention_op, marks=needs_triton)]
)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "places", "window", "softcap"),
    [(4, 2, 16, 200, None, None), (12, 2, 24, 700, None, None), (3, 3, 64, 65, 20, None), (20, 1, 16, 130, None, 5.0),
     (8, 8, 160, 90, 64, 30.0)],
)  # fmt: skip
def test_every_query_sees_the_keys_of_its_text(
    attend: object,
    heads: int,
    kv_heads: int,
    width: int,
    places: int,
    window: int | None,
    softcap: float | None,
) -> None:
    query, key, value = case(heads, kv_heads, width, places)
    for ends in ((places, 1, 64), (places - 1, places // 2, 0)):
        ranges = torch.tensor([[0, ends[0]], [0, ends[1]], [ends[2] // 3, ends[2]]])
        key, value = key.nan_to_num(0.5), value.nan_to_num(0.5)
        # What lies behind the keys has been there before.
        for text, (_, end) in enumerate(ranges.tolist()):
            key[text, end:], value[text, end:] = float("nan"), float("nan")
        found = attend(query, key, value, ranges, width**-0.5, window, softcap)  # type: ignore[operator]
        expected = by_hand(query, key, value, ranges, width**-0.5, window, softcap)
        assert (found - expected).norm() / expected.norm() < 1e-5


def test_what_does_not_fit_is_refused() -> None:
    query, key, value = case(4, 2, 16, 20)
    with pytest.raises(KernelArgumentError, match="do not fit"):
        decode_attention(query[:2], key, value, torch.zeros(3, 2, dtype=torch.int64), scale=1.0)

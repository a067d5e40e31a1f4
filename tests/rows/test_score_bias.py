"""A bias for every pair of places counts alike for one call per text and for all texts in one padded call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slimformer.rows.rows import Rows
from slimformer.rows.score_bias import ScoreBias, _Padded, _Parts
from slimformer.rows.stream import Stream

HEADS, WIDTH, TOKENS = 2, 8, 9
# Padding in front, behind, at both ends, and a row that is padding alone.
TEXTS = ((3, 9), (0, 5), (2, 6), (4, 4))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def text_mask() -> Tensor:
    mask = torch.zeros(len(TEXTS), TOKENS, dtype=torch.bool)
    for row, (begin, end) in zip(mask, TEXTS, strict=True):
        row[begin:end] = True
    return mask


def slowly(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, asking: Tensor, seen: Tensor) -> Tensor:
    """Every query of the batch `[batch, tokens, heads, head_dim]` over the keys that are seen; rows that ask."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.3 + bias
    weights = logits.masked_fill(~seen[:, None, None, :], -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)[asking]


@pytest.mark.parametrize("make", [_Parts, _Padded])
@pytest.mark.parametrize("shared", [True, False], ids=["one bias", "a bias per text"])
@pytest.mark.parametrize("gone", [None, 3], ids=["all text asks", "a third does not"])
@pytest.mark.parametrize("keys", ["left", "batch", "chosen"])
def test_queries_and_keys_take_their_part_of_the_bias(
    make: Any, shared: bool, gone: int | None, keys: str
) -> None:
    text = text_mask()
    q, k, v = (drawn(len(TEXTS), TOKENS, HEADS, WIDTH + n)[..., :WIDTH] for n in range(3))
    values = drawn(1 if shared else len(TEXTS), HEADS, TOKENS, TOKENS)
    asking = text.clone()
    if gone is not None:
        asking.view(-1)[1::gone] = False
    seen = asking if keys == "chosen" else text
    index = asking.flatten().nonzero().squeeze(1)
    offsets = torch.nn.functional.pad(asking.sum(1).cumsum(0), (1, 0))
    token, ranges, own = None, torch.tensor(TEXTS), (k, v)
    if keys != "batch":
        token, ends = seen.flatten().nonzero().squeeze(1) % TOKENS, seen.sum(1).cumsum(0)
        ranges = torch.stack([ends - seen.sum(1), ends], 1)
        own = tuple(t.flatten(0, 1)[seen.flatten()][None] for t in (k, v))
    factors = drawn(len(index)).abs()
    grown = torch.ones(text.numel()).index_copy(0, index, factors).view(len(TEXTS), 1, TOKENS, 1)
    for bias, added in (
        (ScoreBias(values), values),
        (ScoreBias(values / 2, 2.0), values),
        (ScoreBias(values, 1.0, factors), values * grown),
    ):
        parts = make(bias.values, index % TOKENS, offsets, token, ranges)
        actual = parts.attend(bias, q.flatten(0, 1)[index], *own, 0.3)
        torch.testing.assert_close(actual, slowly(q, k, v, added, asking, seen), atol=1e-5, rtol=1e-5)


def test_layers_that_share_their_rows_share_what_is_cut_from_the_bias() -> None:
    text = text_mask()[:3]
    stream = Stream(3, TOKENS, False, torch.device("cpu"), arguments={})
    x = drawn(3 * TOKENS, HEADS * WIDTH)
    stream, _ = stream.without(Rows(text.numel(), given_mask=text.flatten()), x)
    count = int(text.sum())
    q, k, v = (drawn(count, HEADS, WIDTH + n)[..., :WIDTH] for n in range(3))
    bias = ScoreBias(drawn(1, HEADS, TOKENS, TOKENS))
    arguments = (None, stream.token_of(None), stream.ranges(None), stream, 0.3)
    first = bias.attend(q, k[None], v[None], *arguments)
    kept = dict(stream.derived(None))
    second = bias.attend(q, k[None], v[None], *arguments)
    assert torch.equal(first, second)
    assert stream.derived(None) == kept

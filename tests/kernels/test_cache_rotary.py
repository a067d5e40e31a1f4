"""Heads of a decode step on their way to the cache, against the reference and against its parts."""

from __future__ import annotations

import pytest
import torch

from slimformer_kernels import KernelArgumentError, cache_rotary_
from slimformer_kernels.cache_rotary import HeadNorms, cache_rotary_op, cache_rotary_reference
from slimformer_kernels.rotary import rotary_reference


def case(batch, tokens, heads, kv_heads, width, rotary, device="cpu", dtype=torch.float32):
    rows = batch * tokens
    packed = torch.randn(rows, (heads + 2 * kv_heads) * width).to(device, dtype)
    parts = packed.split([heads * width, kv_heads * width, kv_heads * width], 1)
    query, key, value = (part.view(rows, -1, width) for part in parts)
    # As a room has them: [batch, kv_heads, places, width], seen the other way round.
    keys, values = (
        torch.randn(batch, kv_heads, 9, width).to(device, dtype).transpose(1, 2) for _ in range(2)
    )
    place = torch.tensor([5, 6, 7, 8][:tokens], device=device)
    cos, sin = (None, None) if rotary is None else torch.randn(2, rows, rotary).to(device, dtype)
    return query, key, value, keys, values, place, cos, sin


@pytest.mark.full(2)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (3, 1), (2, 4)])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "rotary"), [(4, 2, 16, 16), (3, 1, 24, 8), (2, 2, 80, None)]
)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("offset", [None, 0.0, 1.0])
def test_the_kernel_gives_what_the_reference_gives(
    batch, tokens, heads, kv_heads, width, rotary, interleaved, offset, device, dtype, check_close
):
    given = case(batch, tokens, heads, kv_heads, width, rotary, device, dtype)
    norms = (None, None, 0.0, 0.0)
    if offset is not None:
        norms = (*torch.randn(2, width).to(device, dtype), 0.5, offset)
    # Strides as they are: queries, keys and values are views of one tensor, and the cache is seen the other way round.
    expected = [t if t is None else t.float() if t.is_floating_point() else t for t in given]
    wide = [t.float() if isinstance(t, torch.Tensor) else t for t in norms]
    cache_rotary_reference(*expected, interleaved, *wide)
    cache_rotary_op(*given, interleaved, *norms)
    for place in (0, 3, 4):
        check_close(given[place], expected[place].to(dtype))


def test_the_reference_is_rotation_and_a_copy():
    query, key, value, keys, values, place, cos, sin = case(2, 2, 4, 2, 16, 16)
    before, expected = keys.clone(), rotary_reference(query, cos, sin)
    cache_rotary_(query, key, value, keys, values, place, rotation=(cos, sin))
    torch.testing.assert_close(query, expected)
    torch.testing.assert_close(keys[:, 5:7].flatten(0, 1), rotary_reference(key, cos, sin))
    torch.testing.assert_close(values[:, 5:7].flatten(0, 1), value)
    assert torch.equal(keys[:, :5], before[:, :5])
    norm = torch.nn.RMSNorm(16, 0.1)
    fresh = case(1, 1, 4, 2, 16, None)
    expected = norm(fresh[0])
    cache_rotary_(*fresh[:6], norms=HeadNorms(torch.ones(16), torch.ones(16), 0.1))
    torch.testing.assert_close(fresh[0], expected)


def test_what_does_not_fit_is_refused():
    query, key, value, keys, values, place, _, _ = case(2, 1, 4, 2, 16, None)
    for change in (
        {"query": query[:1]},
        {"values": values[:1]},
        {"place": torch.tensor([1, 2])},
        {"key": key[:, :1]},
    ):
        given = {"query": query, "key": key, "value": value, "keys": keys, "values": values, "place": place}
        with pytest.raises(KernelArgumentError, match="do not fit"):
            cache_rotary_(**{**given, **change})

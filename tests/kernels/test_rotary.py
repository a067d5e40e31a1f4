"""Rotary embedding in place: the kernel against its reference, and the reference against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_rotary
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_rotary

from slimformer_kernels import KernelArgumentError, rotary_, set_debug
from slimformer_kernels.rotary import rotary_op, rotary_reference

PAIRS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "neighbours"])


def tables(positions, width, device="cpu", dtype=torch.float32):
    """Cosines and sines whose halves differ, so that each channel must take its own."""
    angle = torch.randn(positions, width, device=device)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def one_by_one(x, cos, sin, rows, interleaved):
    """The definition, channel by channel in float64."""
    out = x.double().clone()
    width = cos.shape[1]
    for channel in range(width):
        if interleaved:
            partner, sign = channel ^ 1, 1.0 if channel % 2 else -1.0
        else:
            partner, sign = (channel + width // 2) % width, 1.0 if channel >= width // 2 else -1.0
        c, s = cos[rows, channel].double()[:, None], sin[rows, channel].double()[:, None]
        out[..., channel] = x[..., channel].double() * c + sign * x[..., partner].double() * s
    return out


@PAIRS
@pytest.mark.parametrize("width", [6, 10])
def test_reference_is_the_definition(width, interleaved):
    x, (cos, sin) = torch.randn(5, 3, 10), tables(9, width)
    rows = torch.tensor([8, 0, 3, 3, 1])
    got = rotary_reference(x, cos, sin, rows, interleaved)
    torch.testing.assert_close(got.double(), one_by_one(x, cos, sin, rows, interleaved), rtol=1e-5, atol=1e-6)
    got = rotary_reference(x, cos, sin, None, interleaved)
    expected = one_by_one(x, cos, sin, torch.arange(5), interleaved)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_halves_are_those_of_llama():
    query, key = torch.randn(1, 4, 7, 16), torch.randn(1, 2, 7, 16)
    cos, sin = tables(7, 16)
    expected = llama_rotary(query, key, cos[None], sin[None])
    query, key = (t[0].transpose(0, 1) for t in (query, key))
    rotary_(query, key, cos, sin)
    torch.testing.assert_close(query, expected[0][0].transpose(0, 1))
    torch.testing.assert_close(key, expected[1][0].transpose(0, 1))


def test_neighbours_are_those_of_gptj():
    x, (cos, sin) = torch.randn(7, 3, 16), tables(7, 8)
    expected = gptj_rotary(x[None], sin[None], cos[None])[0]
    cos, sin = cos.repeat_interleave(2, 1), sin.repeat_interleave(2, 1)
    rotary_(x, None, cos, sin, interleaved=True)
    torch.testing.assert_close(x, expected)


@pytest.mark.full(2)
@PAIRS
@pytest.mark.parametrize("kind", ["none", "int64", "int32", "repeated"])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head", "width"),
    [(1, 1, 1, 2, 2), (9, 6, 2, 24, 24), (5, 3, None, 80, 20), (0, 4, 4, 16, 16), (2, 32, 8, 128, 128)],
)
def test_kernel_matches_the_reference(
    tokens, heads, kv_heads, head, width, kind, interleaved, device, dtype, check_close
):
    query = torch.randn(tokens, heads, head, device=device).to(dtype)
    key = None if kv_heads is None else torch.randn(tokens, kv_heads, head, device=device).to(dtype)
    cos, sin = tables(tokens + 3, width, device)
    rows = {
        "none": None,
        "int64": torch.randperm(tokens + 3, device=device)[:tokens],
        "int32": torch.randperm(tokens + 3, device=device)[:tokens].int(),
        "repeated": torch.full((tokens,), 1, device=device),
    }[kind]
    expected = [None if x is None else rotary_reference(x, cos, sin, rows, interleaved) for x in (query, key)]
    rotary_op(query, key, cos, sin, rows, interleaved)
    for got, want in zip((query, key), expected, strict=True):
        if want is not None:
            check_close(got, want)


@PAIRS
def test_views_of_one_projection_are_rotated_where_they_lie(interleaved, device, dtype, check_close):
    packed = torch.randn(7, (4 + 2 + 2) * 24 + 5, device=device).to(dtype)
    before = packed.clone()

    def parts(x):
        return x[:, 3 : 3 + 96].unflatten(1, (4, 24)), x[:, 99:147].unflatten(1, (2, 24))

    query, key = parts(packed)
    cos, sin = tables(7, 16, device, dtype)
    cos, sin = torch.cat([cos, sin], 1)[:, :16], torch.cat([sin, cos], 1)[:, :16]
    rotary_op(query, key, cos, sin, None, interleaved)
    for got, want in zip((query, key), parts(before), strict=True):
        check_close(got, rotary_reference(want, cos, sin, None, interleaved))
        assert torch.equal(got[..., 16:], want[..., 16:])
    assert torch.equal(packed[:, :3], before[:, :3])
    assert torch.equal(packed[:, 147:], before[:, 147:])


def test_heads_before_tokens_and_many_heads(device, check_close):
    """A transposed view of [heads, tokens, head_dim]; more heads than one program takes."""
    query = torch.randn(70, 3, 64, device=device).transpose(0, 1)
    key = torch.randn(5, 3, 64, device=device).transpose(0, 1)
    cos, sin = tables(3, 64, device)
    expected = [rotary_reference(x, cos, sin) for x in (query, key)]
    rotary_op(query, key, cos, sin, None, False)
    check_close(query, expected[0])
    check_close(key, expected[1])


def test_operator_declares_what_it_changes(device, interpreted):
    query, key = torch.randn(3, 2, 16, device=device), torch.randn(3, 1, 16, device=device)
    cos, sin = tables(3, 16, device)
    # The interpreter cannot run on fake tensors, which the other checks need.
    tests = {"test_utils": ("test_schema",)} if interpreted else {}
    for other in (key, None):
        torch.library.opcheck(rotary_op.registered, (query, other, cos, sin, None, False), **tests)


X, COS = torch.zeros(6, 2, 8), torch.zeros(9, 8)
WRONG = {
    "query is a matrix": (lambda: rotary_(X[0], None, COS, COS), "query must have three"),
    "query is transposed": (lambda: rotary_(X.mT, None, COS, COS), "last dimension of query"),
    "query is expanded": (lambda: rotary_(X[:1].expand(6, 2, 8), None, COS, COS), "share memory.*strides"),
    "query holds integers": (lambda: rotary_(X.int(), None, COS, COS), "query must hold floating"),
    "key has another dtype": (lambda: rotary_(X, X.half(), COS, COS), "different dtypes"),
    "key has other tokens": (lambda: rotary_(X, X[:5].clone(), COS, COS), r"key.*\(5, 2, 8\).*\(6, 2, 8\)"),
    "cos is too wide": (lambda: rotary_(X, None, torch.zeros(9, 10), COS), "at most 8"),
    "cos is odd": (lambda: rotary_(X, None, COS[:, :7], COS[:, :7]), "rotary_dim even"),
    "sin has another shape": (lambda: rotary_(X, None, COS, COS[:8]), r"sin.*\(8, 8\).*\(9, 8\)"),
    "sin has another dtype": (lambda: rotary_(X, None, COS, COS.half()), "different dtypes"),
    "too few rows": (lambda: rotary_(X, None, COS[:5], COS[:5]), "cos has too few rows: got 5.*at least 6"),
    "rows is a mask": (lambda: rotary_(X, None, COS, COS, rows=X[:, 0, 0] == 0), "list of row indices"),
    "rows is shorter": (lambda: rotary_(X, None, COS, COS, rows=torch.arange(5)), r"rows.*\(5,\).*\(6,\)"),
    "another device": (lambda: rotary_(X, None, COS.to("meta"), COS.to("meta")), "different devices"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument_is_refused(case):
    call, message = WRONG[case]
    with pytest.raises(KernelArgumentError, match=message):
        call()


def test_debugging_checks_the_values_of_rows():
    set_debug(True)
    try:
        for rows in ([0, 1, 2, 3, 4, 9], [0, 1, 2, 3, 4, -1]):
            with pytest.raises(KernelArgumentError, match=r"rows points outside cos.*0 to 8"):
                rotary_(X.clone(), None, COS, COS, rows=torch.tensor(rows))
        rotary_(X.clone(), None, COS, COS, rows=torch.arange(6))
    finally:
        set_debug(False)

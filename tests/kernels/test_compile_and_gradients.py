"""Public functions under ``torch.compile(fullgraph=True)``, and their gradients through the reference."""

from __future__ import annotations

import pytest
import torch

import slimformer_kernels as kernels

ROWS = torch.tensor([0, 2, 3, 7])
ANGLES = torch.linspace(0.1, 3.0, 20, dtype=torch.float64).view(5, 4)
SEQUENCES = {
    "positions": torch.tensor([1, 2, 4, 3, 6]),
    "query_offsets": torch.tensor([0, 3, 5]),
    "key_ranges": torch.tensor([[1, 5], [3, 7]]),
    "longest": 3,
}


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


def rotated(query, key):
    """Both rotated in place, on copies: a leaf that needs a gradient may not change."""
    query, key = query.clone(), key.clone()
    cos, sin = ANGLES.cos(), ANGLES.sin()
    kernels.rotary_(query, key, cos, sin, rows=torch.arange(5).flip(0))
    kernels.rotary_(query, None, cos, sin, interleaved=True)
    return torch.cat([query, key], dim=1)


CALLS = {
    "rms_norm_rows": lambda: (
        lambda x, w: kernels.rms_norm_rows(x, ROWS, w, 1e-5, offset=1.0),
        (draw(9, 6), draw(6)),
    ),
    "layer_norm_rows": lambda: (
        lambda x, w, b: kernels.layer_norm_rows(x, ROWS, w, b),
        (draw(9, 6), draw(6), draw(6)),
    ),
    "add_rows_": lambda: (
        lambda x, y: kernels.add_rows_(x.clone(), ROWS, y),
        (draw(9, 6), draw(4, 6)),
    ),
    "add_rows_rms_norm_": lambda: (
        lambda x, y, w: kernels.add_rows_rms_norm_(x.clone(), ROWS, y, w, 1e-5),
        (draw(9, 6), draw(4, 6), draw(6)),
    ),
    "add_rows_layer_norm_": lambda: (
        lambda x, y, w: kernels.add_rows_layer_norm_(x.clone(), None, y, w),
        (draw(4, 6), draw(4, 6), draw(6)),
    ),
    "add_rms_norm": lambda: (
        lambda x, y, w: torch.cat(kernels.add_rms_norm(x, y, w, 1e-5)),
        (draw(4, 6), draw(4, 6), draw(6)),
    ),
    "add_layer_norm": lambda: (
        lambda x, y, w, b: torch.cat(kernels.add_layer_norm(x, y, w, b)),
        (draw(4, 6), draw(4, 6), draw(6), draw(6)),
    ),
    "rotary_": lambda: (rotated, (draw(5, 3, 6), draw(5, 1, 6))),
    "attention_rows": lambda: (
        lambda q, k, v: kernels.attention_rows(q, k, v, **SEQUENCES, causal=True, scale=0.4),
        (draw(5, 4, 6), draw(2, 7, 2, 6), draw(2, 7, 2, 6)),
    ),
    "attention_rows, packed": lambda: (
        lambda q, k, v: kernels.attention_rows(
            q, k, v, **SEQUENCES, causal=False, scale=0.4, window=3, softcap=2.0
        ),
        (draw(5, 4, 6), draw(1, 7, 2, 6), draw(1, 7, 2, 6)),
    ),
    "swiglu": lambda: (kernels.swiglu, (draw(5, 6), draw(5, 6))),
    "geglu": lambda: (kernels.geglu, (draw(5, 6), draw(5, 6))),
    "swiglu_packed": lambda: (kernels.swiglu_packed, (draw(2, 5, 6),)),
    "geglu_packed": lambda: (lambda x: kernels.geglu_packed(x, approximate="none"), (draw(5, 6),)),
    "chunked_cross_entropy": lambda: (
        lambda h, w: kernels.chunked_cross_entropy(h, w, torch.arange(7), softcap=2.0, chunk=3),
        (draw(7, 4), draw(11, 4)),
    ),
    "chunked_kl": lambda: (
        lambda h, w: kernels.chunked_kl(h, w, teacher_hidden=h.flip(0), temperature=2.0, chunk=3),
        (draw(7, 4), draw(11, 4)),
    ),
}
calls = pytest.mark.parametrize("name", CALLS)


@calls
def test_compiles_in_one_graph_with_the_same_values_and_gradients(name):
    torch.compiler.reset()
    function, inputs = CALLS[name]()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected, got = function(*inputs), compiled(*inputs)
    torch.testing.assert_close(got, expected)
    factor = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, inputs, factor), torch.autograd.grad(expected, inputs, factor), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", [n for n in CALLS if not n.startswith("chunked")])
def test_gradients_are_those_of_finite_differences(name):
    function, inputs = CALLS[name]()
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


def test_pooled_scores_compile_in_one_graph():
    torch.compiler.reset()
    q, k, mask = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.ones(2, 20, dtype=torch.bool)
    compiled = torch.compile(kernels.pooled_scores, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(q, k, mask=mask, block=8), kernels.pooled_scores(q, k, mask=mask, block=8), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_in_place_update_is_seen_outside_the_compiled_graph():
    torch.compiler.reset()
    x, y = torch.randn(9, 6), torch.randn(4, 6)
    expected = kernels.add_rows_(x.clone(), ROWS, y)
    torch.compile(kernels.add_rows_, fullgraph=True, backend="aot_eager")(x, ROWS, y)
    assert torch.equal(x, expected)


def test_rotation_in_place_is_seen_outside_the_compiled_graph():
    torch.compiler.reset()
    packed = torch.randn(5, 24, dtype=torch.float64)

    def rotate(packed):
        query, key = packed[:, :16].unflatten(1, (2, 8)), packed[:, 16:].unflatten(1, (1, 8))
        kernels.rotary_(query, key, ANGLES.cos(), ANGLES.sin())

    expected = packed.clone()
    rotate(expected)
    torch.compile(rotate, fullgraph=True, backend="aot_eager")(packed)
    torch.testing.assert_close(packed, expected)


def test_a_row_count_that_the_compiler_does_not_know_is_one_graph():
    torch.compiler.reset()

    def keep_positive(x, weight, score):
        rows = (score > 0).nonzero().squeeze(1)
        return kernels.rms_norm_rows(x, rows, weight, 1e-5)

    x, weight, score = torch.randn(9, 6), torch.ones(6), torch.randn(9)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(keep_positive, fullgraph=True, backend="aot_eager")
        for values in (score, score.abs() + 1, -score.abs()):
            torch.testing.assert_close(compiled(x, weight, values), keep_positive(x, weight, values))

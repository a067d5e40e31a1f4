"""Linear layers of a step's few rows, with their norm, activation or residual, against their references."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import slimformer_kernels as kernels
from slimformer_kernels.step_linear import (
    InputNorm,
    step_gated_op,
    step_gated_reference,
    step_linear_added_op,
    step_linear_op,
    step_linear_reference,
)

ROWS = pytest.mark.parametrize("rows", [1, 2, 5, 16])
SIZES = pytest.mark.parametrize(
    ("width", "outs"), [(40, (20,)), (576, (33, 7)), (700, (64, 16, 16))], ids=str
)
# The norm's weight counts as it is, or from one on.
NORMS = pytest.mark.parametrize("offset", [None, 0.0, 1.0])


@pytest.fixture
def dot_dtype(dtype, interpreted):
    """The dtypes whose products can be tested here."""
    if interpreted and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter does not multiply bfloat16")
    return dtype


def case(rows, width, outs, offset, device, dtype, bias=True):
    def random(*shape):
        return torch.randn(*shape).to(device, dtype)

    # Rows of something wider; a norm whose eps counts.
    x = random(rows, width + 8)[:, :width]
    norm = (None, 0.0, 0.0) if offset is None else (random(width), 0.5, offset)
    layers = [
        (random(out, width + 8)[:, :width] * width**-0.5, random(out) if bias else None) for out in outs
    ]
    layers = [*layers, (None, None), (None, None)][:3]
    return x, norm, [t for layer in layers for t in layer]


def wide(*given):
    return [t.float() if isinstance(t, torch.Tensor) else t for t in given]


@pytest.mark.full(2)
@ROWS
@SIZES
@NORMS
@pytest.mark.parametrize("bias", [True, False])
def test_layers_side_by_side(rows, width, outs, offset, bias, device, dot_dtype, poisoned, check_close):
    x, norm, layers = case(rows, width, outs, offset, device, dot_dtype, bias)
    with poisoned():
        got = step_linear_op(x, *norm, *layers)
    check_close(got, step_linear_reference(*wide(x, *norm, *layers)).to(dot_dtype))


@pytest.mark.full(2)
@ROWS
@SIZES
@NORMS
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
def test_gated_layers(rows, width, outs, offset, activation, device, dot_dtype, poisoned, check_close):
    x, norm, layers = case(rows, width, (outs[0],) * 2, offset, device, dot_dtype)
    gate, up = layers[0], layers[2]
    with poisoned():
        got = step_gated_op(x, *norm, gate, up, activation)
    check_close(got, step_gated_reference(*wide(x, *norm, gate, up, activation)).to(dot_dtype))


@ROWS
@SIZES
def test_a_layer_is_added(rows, width, outs, device, dot_dtype, poisoned, check_close):
    x, _, (weight, bias, *_) = case(rows, width, outs, None, device, dot_dtype)
    residual = torch.randn(rows, outs[0] + 3).to(device, dot_dtype)[:, : outs[0]]
    with poisoned():
        got = step_linear_added_op(residual, x, weight, bias)
    check_close(got, (residual.float() + F.linear(*wide(x, weight, bias))).to(dot_dtype))


def test_the_references_are_the_layers_themselves():
    x, (weight, eps, offset), layers = case(3, 24, (8, 4, 4), 0.0, "cpu", torch.float32)
    norm = torch.nn.RMSNorm(24, eps)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    h = norm(x)
    pairs = list(zip(layers[::2], layers[1::2], strict=True))
    expected = [F.linear(h, *pair) for pair in pairs]
    given = InputNorm(weight, eps, offset)
    torch.testing.assert_close(kernels.step_linear(x, pairs, given), torch.cat(expected, 1))
    gated = kernels.step_gated(x, layers[2], layers[4], "silu", given)
    torch.testing.assert_close(gated, F.silu(F.linear(h, layers[2])) * F.linear(h, layers[4]))
    added = kernels.step_linear_added(torch.ones(3, 8), x, *pairs[0])
    torch.testing.assert_close(added, 1 + F.linear(x, *pairs[0]))


def test_arguments_that_do_not_fit_are_refused():
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    for call, message in (
        (lambda: kernels.step_linear(x, []), "1 to 3"),
        (lambda: kernels.step_linear(torch.randn(17, 8), [(weight, None)]), "at most 16 rows"),
        (lambda: kernels.step_linear(x, [(weight[:, :7], None)]), "weight"),
        (lambda: kernels.step_linear(x, [(weight, torch.randn(5))]), "bias"),
        (lambda: kernels.step_linear(x, [(weight, None)], InputNorm(torch.ones(7), 1e-6)), "norm"),
        (lambda: kernels.step_gated(x, weight, weight[:3], "silu"), "up"),
        (lambda: kernels.step_gated(x, weight, weight, "relu"), "activation"),
        (lambda: kernels.step_linear_added(torch.randn(2, 5), x, weight), "residual"),
    ):
        with pytest.raises(kernels.KernelArgumentError, match=message):
            call()


def test_the_operators_declare_what_they_change(device, interpreted):
    x, norm, layers = case(2, 40, (20, 20, 4), 0.0, device, torch.float32)
    # The interpreter cannot run on fake tensors, which the other checks need.
    tests = {"test_utils": ("test_schema",)} if interpreted else {}
    torch.library.opcheck(step_linear_op.registered, (x, *norm, *layers), **tests)
    torch.library.opcheck(step_gated_op.registered, (x, *norm, layers[0], layers[2], "silu"), **tests)
    residual = torch.randn(2, 20, device=device)
    torch.library.opcheck(step_linear_added_op.registered, (residual, x, *layers[:2]), **tests)

"""The references against the code they stand in for: transformers, torch.nn and torch.nn.functional."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import slimformer_kernels as kernels

ROWS = torch.tensor([0, 3, 4, 10])
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@HALF
@pytest.mark.parametrize("rows", [None, ROWS, ROWS.int(), ROWS[:0]], ids=["all", "int64", "int32", "zero"])
def test_rms_norm_is_that_of_llama_and_gemma(dtype, rows):
    x = torch.randn(11, 48).to(dtype)
    kept = x if rows is None else x[rows.long()]
    for norm, offset in ((LlamaRMSNorm(48, 1e-6), 0.0), (GemmaRMSNorm(48, 1e-6), 1.0)):
        norm = norm.to(dtype)
        torch.nn.init.normal_(norm.weight)
        with torch.no_grad():
            got = kernels.rms_norm_rows(x, rows, norm.weight, 1e-6, offset=offset)
            assert torch.equal(got, norm(kept))


def test_rms_norm_rounds_where_it_is_told():
    x, weight = torch.randn(2, 64, 32).bfloat16()
    weight = weight[0]
    first = kernels.rms_norm_rows(x, None, weight, 1e-6, multiply_in_fp32=False)
    last = kernels.rms_norm_rows(x, None, weight, 1e-6, multiply_in_fp32=True)
    assert torch.equal(first, kernels.rms_norm_rows(x, None, weight, 1e-6))
    assert not torch.equal(first, last)
    exact = kernels.rms_norm_rows(x.double(), None, weight.double(), 1e-6)
    assert (last - exact).norm() < (first - exact).norm()


@HALF
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_that_of_torch(dtype, bias):
    x = torch.randn(11, 48).to(dtype)
    norm = torch.nn.LayerNorm(48, bias=bias).to(dtype)
    torch.nn.init.normal_(norm.weight)
    with torch.no_grad():
        got = kernels.layer_norm_rows(x, ROWS, norm.weight, norm.bias, norm.eps)
        torch.testing.assert_close(got, norm(x[ROWS]))


@HALF
def test_add_rows_is_the_indexed_residual_add(dtype):
    x, y = torch.randn(11, 8).to(dtype), torch.randn(4, 8).to(dtype)
    expected = x.clone()
    expected[ROWS] += y
    got = kernels.add_rows_(x, ROWS, y)
    assert got is x
    assert torch.equal(x, expected)
    assert torch.equal(kernels.add_rows_(x, None, expected), expected + expected)


@HALF
def test_fused_functions_are_the_two_calls(dtype):
    x, y = torch.randn(11, 8).to(dtype), torch.randn(4, 8).to(dtype)
    weight, bias = torch.randn(2, 8).to(dtype)
    expected = kernels.add_rows_(x.clone(), ROWS, y)
    for offset in (0.0, 1.0):
        residual = x.clone()
        got = kernels.add_rows_rms_norm_(residual, ROWS, y, weight, 1e-6, offset=offset)
        assert torch.equal(residual, expected)
        assert torch.equal(got, kernels.rms_norm_rows(expected, ROWS, weight, 1e-6, offset=offset))
    residual = x.clone()
    got = kernels.add_rows_layer_norm_(residual, ROWS, y, weight, bias, 1e-6)
    assert torch.equal(residual, expected)
    assert torch.equal(got, kernels.layer_norm_rows(expected, ROWS, weight, bias, 1e-6))


@HALF
def test_out_of_place_add_and_norm_are_the_two_steps(dtype):
    x, y = torch.randn(2, 11, 8).to(dtype)
    weight, bias = torch.randn(2, 8).to(dtype)
    before = x.clone()
    for offset in (0.0, 1.0):
        total, normed = kernels.add_rms_norm(x, y, weight, 1e-6, offset=offset)
        assert torch.equal(total, x + y)
        assert torch.equal(normed, kernels.rms_norm_rows(x + y, None, weight, 1e-6, offset=offset))
    total, normed = kernels.add_layer_norm(x, y, weight, bias, 1e-6)
    assert torch.equal(total, x + y)
    torch.testing.assert_close(normed, F.layer_norm(x + y, (8,), weight, bias, 1e-6))
    assert torch.equal(x, before)


@HALF
@pytest.mark.parametrize("shape", [(5, 6), (2, 3, 6), (0, 6)])
def test_glu_is_activation_times_up(dtype, shape):
    gate, up = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    packed = torch.cat([gate, up], dim=-1)
    assert torch.equal(kernels.swiglu(gate, up), F.silu(gate) * up)
    # PyTorch's vectorised loops differ in the last digit between strided and contiguous input.
    torch.testing.assert_close(kernels.swiglu_packed(packed), F.silu(gate) * up)
    for approximate in ("tanh", "none"):
        expected = F.gelu(gate, approximate=approximate) * up
        assert torch.equal(kernels.geglu(gate, up, approximate=approximate), expected)
        torch.testing.assert_close(kernels.geglu_packed(packed, approximate=approximate), expected)


@pytest.mark.parametrize("module", [m.name for m in pkgutil.iter_modules(kernels.__path__)])
def test_examples_in_docstrings_run(module):
    assert doctest.testmod(importlib.import_module(f"slimformer_kernels.{module}")).failed == 0

"""Each kernel that works row by row, against its reference."""

from __future__ import annotations

import pytest
import torch

from slimformer_kernels.add_norm import (
    add_layer_norm_op,
    add_layer_norm_reference,
    add_rms_norm_op,
    add_rms_norm_reference,
)
from slimformer_kernels.add_rows import add_rows_op, add_rows_reference
from slimformer_kernels.add_rows_norm import add_rows_layer_norm_op, add_rows_rms_norm_op
from slimformer_kernels.glu import glu_op, glu_reference
from slimformer_kernels.layer_norm_rows import layer_norm_rows_op, layer_norm_rows_reference
from slimformer_kernels.rms_norm_rows import rms_norm_rows_op, rms_norm_rows_reference
from slimformer_kernels.router_scores import router_scores_op, router_scores_reference

EPS = 1e-5
SHAPES = [(1, 1), (7, 5), (70, 100), (37, 576), (3, 5000)]
KINDS = ["some", "int32", "one", "zero", "every", "all"]
# Llama and Gemma order of rounding.
RMS_KINDS = [(0.0, False), (1.0, True)]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
kinds = pytest.mark.parametrize("kind", KINDS)
# NumPy says so in the interpreter; the infinity is meant, a sigmoid of it is 0.
exp_overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp")


def matrix(tokens, width, device, dtype, *, strided):
    """A random [tokens, width], whose rows lie apart in memory where ``strided``."""
    if strided:
        return torch.randn(tokens, width + 7, device=device).to(dtype)[:, 3 : 3 + width]
    return torch.randn(tokens, width, device=device).to(dtype)


def pick_rows(kind, tokens, device):
    """The row list of one kind; None stands for all rows without a list."""
    if kind == "all":
        return None
    count = {"one": 1, "zero": 0, "every": tokens}.get(kind, (tokens + 1) // 2)
    rows = torch.randperm(tokens, device=device)[:count].sort().values
    return rows.int() if kind == "int32" else rows


def setting(shape, kind, device, dtype, *, strided=False):
    tokens, width = shape
    x = matrix(tokens, width, device, dtype, strided=strided)
    rows = pick_rows(kind, tokens, device)
    kept = tokens if rows is None else rows.numel()
    y = matrix(kept, width, device, dtype, strided=strided)
    weight, bias = torch.randn(2, width, device=device).to(dtype)
    return x, rows, y, weight, bias


@pytest.mark.full(2)
@shapes
@kinds
def test_norms_match_their_references(shape, kind, device, dtype, poisoned, check_close):
    x, rows, _, weight, bias = setting(shape, kind, device, dtype)
    with poisoned():
        rms = [rms_norm_rows_op(x, rows, weight, EPS, *order) for order in RMS_KINDS]
        layer = [layer_norm_rows_op(x, rows, weight, shift, EPS) for shift in (bias, None)]
    for got, order in zip(rms, RMS_KINDS, strict=True):
        check_close(got, rms_norm_rows_reference(x, rows, weight, EPS, *order))
    for got, shift in zip(layer, (bias, None), strict=True):
        check_close(got, layer_norm_rows_reference(x, rows, weight, shift, EPS))


@pytest.mark.full(2)
@shapes
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_router_scores_are_the_norm_times_a_vector(shape, strided, device, dtype, poisoned, check_close):
    x, _, _, weight, router = setting(shape, "all", device, dtype, strided=strided)
    bias = torch.randn(1, device=device)
    for order in RMS_KINDS:
        for rows in (x, x[:0]):
            with poisoned():
                got = router_scores_op(rows, weight, EPS, router.float(), bias, *order)
            expected = router_scores_reference(rows, weight, EPS, router.float(), bias, *order)
            check_close(got, expected, tolerance=1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.full(2)
@shapes
@kinds
def test_add_rows_matches_its_reference_and_leaves_other_rows(shape, kind, device, dtype, check_close):
    x, rows, y, _, _ = setting(shape, kind, device, dtype)
    expected = add_rows_reference(x.clone(), rows, y)
    before = x.clone()
    add_rows_op(x, rows, y)
    check_close(x, expected)
    if rows is not None:
        others = torch.ones(x.shape[0], dtype=torch.bool, device=device)
        others[rows.long()] = False
        assert torch.equal(x[others], before[others])


@pytest.mark.full(2)
@shapes
@kinds
def test_fused_add_and_norm_matches_the_two_steps(shape, kind, device, dtype, poisoned, check_close):
    x, rows, y, weight, bias = setting(shape, kind, device, dtype)
    expected = add_rows_reference(x.clone(), rows, y)
    for order in RMS_KINDS:
        residual = x.clone()
        with poisoned():
            got = add_rows_rms_norm_op(residual, rows, y, weight, EPS, *order)
        check_close(residual, expected)
        check_close(got, rms_norm_rows_reference(expected, rows, weight, EPS, *order))
    for shift in (bias, None):
        residual = x.clone()
        with poisoned():
            got = add_rows_layer_norm_op(residual, rows, y, weight, shift, EPS)
        check_close(residual, expected)
        check_close(got, layer_norm_rows_reference(expected, rows, weight, shift, EPS))


@pytest.mark.full(2)
@shapes
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
def test_add_norm_matches_its_reference(shape, strided, empty, device, dtype, poisoned, check_close):
    x, _, y, weight, bias = setting(shape, "all", device, dtype, strided=strided)
    if empty:
        x, y = x[:0], y[:0]
    before = x.clone(), y.clone()
    for order in RMS_KINDS:
        with poisoned():
            got = add_rms_norm_op(x, y, weight, EPS, *order)
        for ours, expected in zip(got, add_rms_norm_reference(x, y, weight, EPS, *order), strict=True):
            check_close(ours, expected)
            assert ours.is_contiguous()
    for shift in (bias, None):
        with poisoned():
            got = add_layer_norm_op(x, y, weight, shift, EPS)
        for ours, expected in zip(got, add_layer_norm_reference(x, y, weight, shift, EPS), strict=True):
            check_close(ours, expected)
            assert ours.is_contiguous()
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])


def test_strided_rows_and_strided_indices_are_read_in_place(device, dtype, poisoned, check_close):
    x, _, y, weight, bias = setting((20, 24), "some", device, dtype, strided=True)
    rows = torch.arange(20, device=device)[::2]
    y = y[:10]
    assert x.stride(0) != x.shape[1]
    assert rows.stride(0) == 2
    expected = add_rows_reference(x.clone(), rows, y)
    backing = x._base.clone()
    with poisoned():
        rms = rms_norm_rows_op(x, rows, weight, EPS, 0.0, False)
        layer = layer_norm_rows_op(x, rows, weight, bias, EPS)
    check_close(rms, rms_norm_rows_reference(x, rows, weight, EPS, 0.0, False))
    check_close(layer, layer_norm_rows_reference(x, rows, weight, bias, EPS))
    with poisoned():
        fused = add_rows_rms_norm_op(x, rows, y, weight, EPS, 0.0, False)
    check_close(x, expected)
    check_close(fused, rms_norm_rows_reference(expected, rows, weight, EPS, 0.0, False))
    assert torch.equal(x._base[:, :3], backing[:, :3])
    assert torch.equal(x._base[:, 27:], backing[:, 27:])


@pytest.mark.full(2)
@exp_overflows
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("shape", [(0, 8), (1, 17), *SHAPES[1:]], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("packed", [False, True])
def test_glu_matches_its_reference(shape, activation, packed, device, dtype, poisoned, check_close):
    tokens, width = shape
    gate_up = torch.randn(tokens, 2 * width, device=device).mul(3).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    if not packed:
        gate, up = gate.contiguous(), up.contiguous()
    with poisoned():
        got = glu_op(gate, up, activation)
    check_close(got, glu_reference(gate, up, activation))


@exp_overflows
def test_glu_saturates_without_overflow(device, check_close):
    gate = torch.tensor([[-1e4, -100.0, -10.0, 0.0, 10.0, 100.0, 1e4]], device=device)
    up = torch.ones_like(gate)
    for activation in ("silu", "gelu_tanh", "gelu"):
        check_close(glu_op(gate, up, activation), glu_reference(gate, up, activation))


def test_layer_norm_keeps_its_digits_beside_a_large_mean(device, check_close):
    x = torch.randn(4, 300, device=device) + 1000.0
    weight = torch.ones(300, device=device)
    exact = layer_norm_rows_reference(x.double(), None, weight, None, EPS).float()
    # The mean is exact to 6e-5 here; a variance from the mean square would be off by a few per cent.
    check_close(layer_norm_rows_op(x, None, weight, None, EPS), exact, tolerance=1e-3)


def test_operators_declare_what_they_change(device, interpreted):
    x, rows, y, weight, bias = setting((9, 40), "some", device, torch.float32)
    # The interpreter cannot run on fake tensors, which the other checks need.
    tests = {"test_utils": ("test_schema",)} if interpreted else {}
    for op, args in [
        (rms_norm_rows_op, (x, rows, weight, EPS, 0.0, False)),
        (layer_norm_rows_op, (x, rows, weight, bias, EPS)),
        (add_rows_op, (x, rows, y)),
        (add_rows_rms_norm_op, (x, rows, y, weight, EPS, 1.0, True)),
        (add_rows_layer_norm_op, (x, None, x.clone(), weight, None, EPS)),
        (glu_op, (x, x.clone(), "silu")),
        (router_scores_op, (x, weight, EPS, bias, weight[:1], 0.0, False)),
        (add_rms_norm_op, (x, x.clone(), weight, EPS, 1.0, True)),
        (add_layer_norm_op, (x, x.clone(), weight, bias, EPS)),
    ]:
        torch.library.opcheck(op.registered, args, **tests)

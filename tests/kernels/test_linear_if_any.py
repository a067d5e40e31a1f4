"""The linear layer that may read nothing, against its reference."""

from __future__ import annotations

import pytest
import torch

import slimformer_kernels as kernels
from slimformer_kernels.linear_if_any import linear_if_any_op, linear_if_any_reference


@pytest.mark.full(2)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wanted", ["none", "some", "all"])
@pytest.mark.parametrize("shape", [(1, 40, 20), (2, 576, 33), (3, 700, 16), (4, 1, 1)], ids=str)
def test_it_matches_its_reference(shape, wanted, bias, device, dtype, poisoned, check_close):
    rows, width, out = shape
    x, weight = torch.randn(rows, width, device=device).to(dtype), torch.randn(out, width, device=device)
    weight = (weight * width**-0.5).to(dtype)
    shift = torch.randn(out, device=device).to(dtype) if bias else None
    mask = torch.full((rows,), wanted == "all", device=device)
    if wanted == "some":
        mask[0] = True
    with poisoned():
        got = linear_if_any_op(x, weight, shift, mask)
    check_close(got, linear_if_any_reference(x, weight, shift, mask))
    assert not got[~mask].any()


def test_no_weight_is_read_where_no_row_wants_it(device):
    x, weight = torch.randn(2, 64, device=device), torch.full((24, 64), float("nan"), device=device)
    nobody = torch.zeros(2, dtype=torch.bool, device=device)
    assert not linear_if_any_op(x, weight, None, nobody).any()
    assert linear_if_any_op(x, weight, None, ~nobody).isnan().all()


def test_arguments_that_do_not_fit_are_refused():
    x, weight, wanted = torch.randn(2, 8), torch.randn(4, 8), torch.tensor([True, False])
    for change, message in (
        ({"weight": torch.randn(4, 7)}, "weight"),
        ({"weight": weight.double()}, "weight"),
        ({"wanted": wanted[:1]}, "wanted"),
        ({"wanted": wanted.int()}, "must be bool"),
        ({"x": torch.randn(5, 8), "wanted": torch.ones(5).bool()}, "at most 4 rows"),
    ):
        given = {"x": x, "weight": weight, "wanted": wanted, **change}
        with pytest.raises(kernels.KernelArgumentError, match=message):
            kernels.linear_if_any(given["x"], given["weight"], None, given["wanted"])


def test_the_operator_declares_what_it_changes(device, interpreted):
    x, weight = torch.randn(2, 64, device=device), torch.randn(24, 64, device=device)
    # The interpreter cannot run on fake tensors, which the other checks need.
    tests = {"test_utils": ("test_schema",)} if interpreted else {}
    wanted = torch.tensor([True, False], device=device)
    torch.library.opcheck(linear_if_any_op.registered, (x, weight, None, wanted), **tests)

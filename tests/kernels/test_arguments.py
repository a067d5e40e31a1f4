"""Wrong arguments are refused with a message that says what came, what is allowed and what to do."""

from __future__ import annotations

import pickle

import pytest
import torch

import slimformer_kernels as kernels
from slimformer_kernels import KernelArgumentError

X, W = torch.zeros(6, 4), torch.ones(4)
ROWS, Y = torch.tensor([1, 3]), torch.zeros(2, 4)
Q = torch.zeros(1, 4, 8, 16)
H, V, L = torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.long)

WRONG = {
    "x is not a matrix": (lambda: kernels.rms_norm_rows(X[None], None, W, 1e-6), r"\(1, 6, 4\).*\.view\(-1"),
    "x has no columns": (lambda: kernels.rms_norm_rows(X[:, :0], None, W[:0], 1e-6), "at least one column"),
    "x holds integers": (lambda: kernels.rms_norm_rows(X.int(), None, W, 1e-6), "x must hold floating"),
    "x is transposed": (
        lambda: kernels.layer_norm_rows(X.T, None, torch.ones(6)),
        r"last dimension of x.*\(1, 4\).*contiguous\(\)",
    ),
    "x is on another device": (
        lambda: kernels.rms_norm_rows(X.to("meta"), None, W, 1e-6),
        "different devices.*cpu and meta",
    ),
    "rows is a mask": (lambda: kernels.rms_norm_rows(X, X[:, 0] == 0, W, 1e-6), r"torch.bool.*nonzero"),
    "rows is a matrix": (lambda: kernels.add_rows_(X, ROWS[None], Y), "list of row indices"),
    "weight has another width": (
        lambda: kernels.rms_norm_rows(X, None, W[:3], 1e-6),
        r"weight.*\(3,\).*\(4,\)",
    ),
    "weight is strided": (
        lambda: kernels.rms_norm_rows(X, None, torch.ones(8)[::2], 1e-6),
        r"weight\.contig",
    ),
    "bias has another width": (lambda: kernels.layer_norm_rows(X, None, W, W[:3]), r"bias.*\(3,\)"),
    "eps is zero": (lambda: kernels.rms_norm_rows(X, None, W, 0.0), "eps must be positive"),
    "y has another length": (lambda: kernels.add_rows_(X, ROWS, X), r"y.*\(6, 4\).*\(2, 4\)"),
    "y has another dtype": (lambda: kernels.add_rows_(X, ROWS, Y.half()), "float16 and torch.float32"),
    "y is transposed": (lambda: kernels.add_rows_(X, ROWS, torch.zeros(4, 2).T), "last dimension of y"),
    "x is expanded": (lambda: kernels.add_rows_(W.expand(6, 4), ROWS, Y), "share memory.*row stride 0"),
    "fused: y has another length": (lambda: kernels.add_rows_rms_norm_(X, None, Y, W, 1e-6), r"\(6, 4\)"),
    "fused: weight": (lambda: kernels.add_rows_layer_norm_(X, ROWS, Y, W[:2]), r"weight.*\(2,\)"),
    "add_norm: y has another length": (
        lambda: kernels.add_rms_norm(X, Y, W, 1e-6),
        r"y.*\(2, 4\).*\(6, 4\)",
    ),
    "add_norm: y has another dtype": (lambda: kernels.add_layer_norm(X, X.half(), W), "different dtypes"),
    "add_norm: y is transposed": (
        lambda: kernels.add_layer_norm(X, torch.zeros(4, 6).T, W),
        "last dimension of y",
    ),
    "add_norm: weight": (lambda: kernels.add_rms_norm(X, X, W[:2], 1e-6), r"weight.*\(2,\)"),
    "add_norm: bias": (lambda: kernels.add_layer_norm(X, X, W, W[:3]), r"bias.*\(3,\)"),
    "add_norm: eps is zero": (lambda: kernels.add_rms_norm(X, X, W, 0.0), "eps must be positive"),
    "up has another shape": (lambda: kernels.swiglu(X, X[:5]), r"up.*\(5, 4\).*\(6, 4\)"),
    "up has another dtype": (lambda: kernels.swiglu(X, X.half()), "different dtypes"),
    "gate is transposed": (lambda: kernels.swiglu(X.T, X.T), "last dimension of gate"),
    "gate_up is odd": (lambda: kernels.swiglu_packed(X[:, :3]), "gate and an up half"),
    "unknown gelu": (lambda: kernels.geglu(X, X, approximate="erf"), "'erf'.*'tanh' or 'none'"),
    "q is not four-dimensional": (lambda: kernels.pooled_scores(Q[0], Q), "q must have four"),
    "k has other tokens": (lambda: kernels.pooled_scores(Q, Q[:, :, :5]), r"k.*\(1, 4, 5, 16\)"),
    "heads do not divide": (lambda: kernels.pooled_scores(Q, Q[:, :3]), "multiple.*4 and 3"),
    "mask is not bool": (lambda: kernels.pooled_scores(Q, Q, mask=torch.ones(1, 8)), r"mask\.bool\(\)"),
    "mask has another shape": (lambda: kernels.pooled_scores(Q, Q, mask=torch.ones(8) > 0), r"mask.*\(8,\)"),
    "scale is negative": (lambda: kernels.pooled_scores(Q, Q, scale=-1.0), "scale must be positive"),
    "block is zero": (lambda: kernels.pooled_scores(Q, Q, block=0), "block must be positive"),
    "head does not fit": (
        lambda: kernels.chunked_cross_entropy(H, V.T, L),
        "head_weight does not fit hidden",
    ),
    "labels are floats": (lambda: kernels.chunked_cross_entropy(H, V, L.float()), r"labels\.long\(\)"),
    "labels are shorter": (lambda: kernels.chunked_cross_entropy(H, V, L[:2]), r"labels.*\(2,\).*\(3,\)"),
    "bias of the head": (lambda: kernels.chunked_cross_entropy(H, V, L, bias=W), "head's bias"),
    "head has another dtype": (lambda: kernels.chunked_cross_entropy(H, V.half(), L), "different dtypes"),
    "unknown reduction": (lambda: kernels.chunked_cross_entropy(H, V, L, reduction="max"), "'max'"),
    "chunk is zero": (lambda: kernels.chunked_cross_entropy(H, V, L, chunk=0), "chunk must be positive"),
    "softcap is zero": (lambda: kernels.chunked_cross_entropy(H, V, L, softcap=0.0), "softcap must be pos"),
    "no teacher": (lambda: kernels.chunked_kl(H, V), "got nothing"),
    "two teachers": (
        lambda: kernels.chunked_kl(H, V, teacher_hidden=H, teacher_logits=torch.zeros(3, 7)),
        "teacher_logits, teacher_hidden",
    ),
    "teacher without its weight": (
        lambda: kernels.chunked_kl(H, V, teacher_hidden=H, teacher_bias=torch.zeros(7)),
        "teacher_hidden, teacher_bias",
    ),
    "teacher has another vocabulary": (
        lambda: kernels.chunked_kl(H, V, teacher_hidden=H, teacher_weight=V[:5]),
        r"teacher_weight.*\(5, 4\).*\(7, 4\)",
    ),
    "teacher logits": (lambda: kernels.chunked_kl(H, V, teacher_logits=H), r"teacher_logits.*\(3, 7\)"),
    "kl mask": (lambda: kernels.chunked_kl(H, V, teacher_hidden=H, mask=L), "mask must be bool"),
    "temperature": (lambda: kernels.chunked_kl(H, V, teacher_hidden=H, temperature=0.0), "temperature"),
}

WRONG_VALUES = {
    "unsorted": (torch.tensor([3, 1]), r"strictly ascending: got \[3, 1\].*unique"),
    "repeated": (torch.tensor([1, 1]), "strictly ascending"),
    "negative": (torch.tensor([-1, 1]), "points outside x: got indices -1 to 1"),
    "too large": (torch.tensor([1, 6]), "allowed: 0 to 5"),
}


@pytest.fixture
def debug():
    kernels.set_debug(True)
    yield
    kernels.set_debug(False)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument_is_refused(case):
    call, message = WRONG[case]
    with pytest.raises(KernelArgumentError, match=message) as caught:
        call()
    assert all(part in str(caught.value) for part in (": got ", "; allowed: ", "; "))


@pytest.mark.parametrize("case", WRONG_VALUES)
def test_debugging_checks_the_values_of_rows(case, debug):
    rows, message = WRONG_VALUES[case]
    for call in (lambda: kernels.rms_norm_rows(X, rows, W, 1e-6), lambda: kernels.add_rows_(X, rows, Y)):
        with pytest.raises(KernelArgumentError, match=message):
            call()


def test_debugging_checks_labels(debug):
    with pytest.raises(KernelArgumentError, match=r"got 0 to 9; allowed: 0 to 6"):
        kernels.chunked_cross_entropy(H, V, torch.tensor([0, -100, 9]))


def test_debugging_takes_good_values(debug):
    kernels.rms_norm_rows(X, ROWS, W, 1e-6)
    kernels.rms_norm_rows(X, ROWS[:0], W, 1e-6)
    kernels.chunked_cross_entropy(H, V, torch.full((3,), -100))
    compiled = torch.compile(kernels.rms_norm_rows, fullgraph=True, backend="eager")
    compiled(X, ROWS, W, 1e-6)


def test_refused_update_leaves_x_alone():
    x = torch.ones(6, 4)
    with pytest.raises(KernelArgumentError):
        kernels.add_rows_rms_norm_(x, ROWS, Y + 1, W[:3], 1e-6)
    assert torch.equal(x, torch.ones(6, 4))


def test_error_is_a_value_error_that_travels_between_processes():
    error = KernelArgumentError.of("a", got=1, allowed="2", remedy="do b")
    assert isinstance(error, ValueError)
    assert str(pickle.loads(pickle.dumps(error))) == "a: got 1; allowed: 2; do b."

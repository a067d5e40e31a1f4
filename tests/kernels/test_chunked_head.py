"""The chunked losses against the unchunked ones: values, gradients and the memory they promise."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from slimformer_kernels import chunked_cross_entropy, chunked_kl
from slimformer_kernels.chunked_head import cross_entropy_reference, kl_reference

TOKENS, WIDTH, VOCABULARY = 13, 8, 37
CHUNKS = pytest.mark.parametrize("chunk", [1, 5, 13, 100])
HEADS = pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, None), (True, 2.0)])


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return out


def head(bias, dtype=torch.float64):
    """Hidden states, head weight, and bias or None; all of them with gradients."""
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randn(VOCABULARY, dtype=dtype).requires_grad_() if bias else None


def some_labels():
    labels = torch.randint(VOCABULARY, (TOKENS,))
    labels[::4] = -100
    return labels


def same_gradients(got, expected, inputs):
    inputs = [t for t in inputs if t is not None]
    for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.full(2)
@CHUNKS
@HEADS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_the_unchunked_one(chunk, bias, softcap, reduction):
    hidden, weight, shift = head(bias)
    labels = some_labels()
    got = chunked_cross_entropy(
        hidden, weight, labels, bias=shift, softcap=softcap, reduction=reduction, chunk=chunk
    )
    losses = cross_entropy_reference(hidden, weight, labels, shift, softcap)
    expected = {"mean": losses.sum() / (labels >= 0).sum(), "sum": losses.sum(), "none": losses}[reduction]
    torch.testing.assert_close(got, expected)
    factor = torch.randn_like(got)
    same_gradients((got * factor).sum(), (expected * factor).sum(), (hidden, weight, shift))


def test_cross_entropy_reference_is_that_of_torch():
    hidden, weight, shift = head(True)
    labels = some_labels()
    expected = F.cross_entropy(F.linear(hidden, weight, shift), labels)
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, labels, bias=shift), expected)


@pytest.mark.full(2)
@CHUNKS
@HEADS
@pytest.mark.parametrize("teacher", ["logits", "hidden", "same head"])
def test_kl_is_the_unchunked_one(chunk, bias, softcap, teacher):
    hidden, weight, shift = head(bias)
    mask = torch.arange(TOKENS) % 3 > 0
    states = torch.randn(TOKENS, WIDTH if teacher == "same head" else 6, dtype=torch.float64)
    other = torch.randn(VOCABULARY, 6, dtype=torch.float64)
    matrix, offset = (weight.detach(), shift) if teacher == "same head" else (other, None)
    logits = F.linear(states, matrix, None if offset is None else offset.detach())
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    given = {
        "logits": {"teacher_logits": logits},
        "hidden": {"teacher_hidden": states, "teacher_weight": other},
        "same head": {"teacher_hidden": states},
    }[teacher]
    got = chunked_kl(
        hidden, weight, **given, bias=shift, softcap=softcap, temperature=1.7, mask=mask, chunk=chunk
    )
    losses = kl_reference(hidden, weight, logits, shift, softcap, 1.7)
    expected = losses[mask].mean()
    torch.testing.assert_close(got, expected)
    same_gradients(got, expected, (hidden, weight, shift))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_are_those_of_finite_differences(softcap):
    hidden, weight, shift = head(True)
    labels, logits = some_labels(), torch.randn(TOKENS, VOCABULARY, dtype=torch.float64)

    def cross_entropy(*inputs):
        return chunked_cross_entropy(inputs[0], inputs[1], labels, bias=inputs[2], softcap=softcap, chunk=4)

    def kl(*inputs):
        return chunked_kl(
            inputs[0],
            inputs[1],
            teacher_logits=logits,
            bias=inputs[2],
            softcap=softcap,
            temperature=0.8,
            chunk=4,
        )

    assert torch.autograd.gradcheck(cross_entropy, (hidden, weight, shift), fast_mode=True)
    assert torch.autograd.gradcheck(kl, (hidden, weight, shift), fast_mode=True)


def test_no_tensor_outgrows_a_chunk_of_logits():
    tokens, width, vocabulary, chunk = 200, 4, 300, 8
    weight, hidden = torch.randn(vocabulary, width), torch.randn(tokens, width)
    labels = torch.randint(vocabulary, (tokens,))
    for loss in (
        lambda h: chunked_cross_entropy(h, weight, labels, chunk=chunk, softcap=3.0),
        lambda h: chunked_kl(h, weight, teacher_hidden=hidden, chunk=chunk),
    ):
        student = torch.randn(tokens, width, requires_grad=True)
        with LargestTensor() as largest:
            loss(student).backward()
        assert largest.elements == chunk * vocabulary
        assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_close(dtype):
    hidden, weight, _ = head(False, dtype)
    labels = some_labels()
    got = chunked_cross_entropy(hidden, weight, labels, chunk=3)
    exact = F.cross_entropy(hidden.double() @ weight.double().T, labels)
    assert got.dtype == torch.float32
    assert (got - exact).abs() < 1e-2 * exact
    for a, b in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert a.dtype == dtype
        assert (a - b).norm() < 1e-2 * b.norm()


def test_leading_dimensions_are_kept():
    hidden, weight = torch.randn(2, 5, WIDTH), torch.randn(VOCABULARY, WIDTH)
    labels = torch.randint(VOCABULARY, (2, 5))
    labels[0, 1] = -100
    losses = chunked_cross_entropy(hidden, weight, labels, reduction="none", chunk=3)
    assert losses.shape == (2, 5)
    assert losses[0, 1] == 0
    assert chunked_kl(hidden, weight, teacher_hidden=hidden, reduction="none").shape == (2, 5)


def test_nothing_to_count_is_a_zero_loss():
    hidden, weight, _ = head(False)
    loss = chunked_cross_entropy(hidden, weight, torch.full((TOKENS,), -100))
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    nothing = torch.zeros(0, WIDTH, dtype=torch.float64)
    assert chunked_kl(nothing, weight, teacher_hidden=nothing) == 0


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_frozen_head_changes_no_gradient_of_hidden_states(softcap):
    hidden, weight, shift = head(True)
    teacher, rows = torch.randn_like(hidden), torch.rand(len(hidden), dtype=torch.float64)
    found = []
    for frozen in (True, False):
        matrix, bias = (weight.detach(), shift.detach()) if frozen else (weight, shift)
        losses = chunked_kl(
            hidden, matrix, teacher_hidden=teacher, bias=bias, softcap=softcap, temperature=1.7,
            reduction="none", chunk=4,
        )  # fmt: skip
        found.append(torch.autograd.grad(losses @ rows, hidden)[0])
    torch.testing.assert_close(*found)


def test_frozen_head_gets_no_gradient():
    hidden, weight, _ = head(False)
    weight = weight.detach()
    chunked_cross_entropy(hidden, weight, some_labels()).backward()
    assert weight.grad is None
    assert hidden.grad is not None

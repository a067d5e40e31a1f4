"""The autograd functions under ``chunked_head``: per-token losses a chunk of tokens at a time, and their gradients.

Where the head is trained too, the backward pass computes the logits of a chunk again from the hidden states. That
costs one more product than keeping them, and the peak stays at a few ``[chunk, vocabulary]`` float32 buffers for any
number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class ChunkedCrossEntropy(torch.autograd.Function):
    """Losses ``[n]``; keeps the log-sum-exp of each token and computes logits again in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
        chunk: int,
    ) -> Tensor:
        """Return ``logsumexp(logits) - logits[target]`` of each of the ``[n, hidden]`` tokens."""
        normaliser = hidden.new_empty(hidden.shape[0], dtype=_wide(hidden))
        picked = torch.empty_like(normaliser)
        for part in _parts(hidden.shape[0], chunk):
            logits = head_logits(hidden[part], weight, bias, softcap)
            normaliser[part] = logits.logsumexp(-1)
            picked[part] = logits.gather(1, targets[part, None]).squeeze(1)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.softcap, ctx.chunk = softcap, chunk
        return normaliser - picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the logits is ``softmax(logits)``, less 1 at the target."""
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        sums = _HeadGradient(hidden, weight, bias, ctx.needs_input_grad)
        for part in _parts(hidden.shape[0], ctx.chunk):
            logits = head_logits(hidden[part], weight, bias, ctx.softcap)
            delta = (logits - normaliser[part, None]).exp_()
            label = targets[part, None]
            delta.scatter_add_(1, label, torch.full_like(label, -1, dtype=delta.dtype))
            sums.add(part, delta.mul_(grad[part, None]), logits, ctx.softcap)
        return (*sums.result(), None, None, None)


class ChunkedKL(torch.autograd.Function):
    """Losses ``[n]``; with a head that is not trained, the gradient is found on the way and logits are computed once.

    The gradient of a token's loss in its hidden state needs nothing of the other tokens, so that the gradient that
    arrives in backward is a factor of each. A head that is trained needs logits again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Tensor,
        teacher_weight: Tensor | None,
        teacher_bias: Tensor | None,
        softcap: float | None,
        temperature: float,
        chunk: int,
    ) -> Tensor:
        """Return ``temperature**2 * KL(teacher || student)`` of each of the ``[n, hidden]`` tokens."""
        ctx.softcap, ctx.temperature, ctx.chunk = softcap, temperature, chunk
        losses = hidden.new_empty(hidden.shape[0], dtype=_wide(hidden))
        needed = ctx.needs_input_grad[:3]
        ctx.at_once = needed == (True, False, False)
        sums = _HeadGradient(hidden, weight, bias, (ctx.at_once, False, False))
        for part in _parts(hidden.shape[0], chunk):
            logits = head_logits(hidden[part], weight, bias, softcap)
            student, target = _log_distributions(
                logits, teacher[part], teacher_weight, teacher_bias, softcap, temperature
            )
            probabilities = target.exp()
            losses[part] = _row_dots(probabilities, target.sub_(student)) * temperature**2
            if ctx.at_once:
                sums.add(part, student.exp_().sub_(probabilities).mul_(temperature), logits, softcap)
        if ctx.at_once:
            ctx.save_for_backward(sums.result()[0])
        else:
            ctx.save_for_backward(hidden, weight, bias, teacher, teacher_weight, teacher_bias)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the softened logits is the difference of the two distributions."""
        rest = (None,) * 6
        if ctx.at_once:
            (found,) = ctx.saved_tensors
            return ((found * grad[:, None]).to(found.dtype), None, None, *rest)
        hidden, weight, bias, teacher, teacher_weight, teacher_bias = ctx.saved_tensors
        sums = _HeadGradient(hidden, weight, bias, ctx.needs_input_grad)
        for part in _parts(hidden.shape[0], ctx.chunk):
            logits = head_logits(hidden[part], weight, bias, ctx.softcap)
            student, target = _log_distributions(
                logits, teacher[part], teacher_weight, teacher_bias, ctx.softcap, ctx.temperature
            )
            delta = student.exp_().sub_(target.exp_())
            # The squared temperature of the loss over the one of the softened logits.
            sums.add(part, delta.mul_(grad[part, None] * ctx.temperature), logits, ctx.softcap)
        return (*sums.result(), *rest)


class _HeadGradient:
    """Sums the gradients of hidden, head weight and bias over the chunks, those that are needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]) -> None:
        self._inputs = hidden, weight, bias
        wide = _wide(hidden)
        self._hidden = torch.empty_like(hidden) if needed[0] else None
        # Rounding each partial sum to half precision would lose digits with every chunk.
        self._weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self._bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(self, part: slice, delta: Tensor, logits: Tensor, softcap: float | None) -> None:
        """Add one chunk: ``delta [chunk, vocabulary]`` is the gradient of ``logits``, and is used up."""
        hidden, weight, _ = self._inputs
        if softcap is not None:
            delta.mul_(1.0 - (logits / softcap).square_())
        if self._bias is not None:
            self._bias += delta.sum(0)
        delta = delta.to(hidden.dtype)
        if self._hidden is not None:
            self._hidden[part] = delta @ weight
        if self._weight is not None:
            self._weight += delta.mT @ hidden[part]

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the dtypes of their inputs."""
        _, weight, bias = self._inputs
        grad_weight = None if self._weight is None else self._weight.to(weight.dtype)
        grad_bias = None if self._bias is None or bias is None else self._bias.to(bias.dtype)
        return self._hidden, grad_weight, grad_bias


def _parts(count: int, chunk: int) -> Iterator[slice]:
    for start in range(0, count, chunk):
        yield slice(start, start + chunk)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits ``[n, vocabulary]``, at least float32, of ``hidden [n, hidden]``."""
    logits = F.linear(hidden, weight, bias).to(_wide(hidden))
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _log_distributions(
    logits: Tensor,
    teacher: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    softcap: float | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """The logarithms of both softened distributions, in tensors of their own."""
    target = (
        teacher if teacher_weight is None else head_logits(teacher, teacher_weight, teacher_bias, softcap)
    )
    target = target.to(logits.dtype)
    if temperature != 1.0:
        logits, target = logits / temperature, target / temperature
    return logits.log_softmax(-1), target.log_softmax(-1)


def _row_dots(left: Tensor, right: Tensor) -> Tensor:
    """The sum of products of each row ``[n]``, without a product in memory."""
    return torch.linalg.vecdot(left, right)

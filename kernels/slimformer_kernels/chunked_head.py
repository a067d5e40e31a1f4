"""Losses on the LM head that never hold the logits of all tokens: [chunk, vocabulary] at a time, both ways.

cuBLAS does the work, so there is no Triton kernel here; ``chunked_losses.py`` holds the autograd functions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    check_choice,
    check_device,
    check_dtype,
    check_floating,
    check_positive,
    check_shape,
    debugging,
)
from .chunked_losses import ChunkedCrossEntropy, ChunkedKL, head_logits
from .errors import KernelArgumentError

_REDUCTIONS = ("mean", "sum", "none")


def chunked_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int = 1024,
) -> Tensor:
    """Cross entropy of ``hidden @ head_weight.T`` against ``labels``, a chunk of tokens at a time.

    The "segment-based" loss of LeMo (arXiv 2501.09767). Logits are computed in the input dtype, everything
    after them in float32. Labels are not shifted: position i of ``hidden`` predicts position i of ``labels``.

    Args:
        hidden: ``[..., hidden]``.
        head_weight: ``[vocabulary, hidden]`` in the dtype of ``hidden``.
        labels: ``[...]`` int64; ``ignore_index`` marks positions without a loss.
        bias: ``[vocabulary]`` or None.
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2); None for none.
        ignore_index: the label that is left out.
        reduction: ``"mean"`` over the counted positions, ``"sum"``, or ``"none"`` for ``[...]`` losses with
            zeros at ignored positions. The mean over no position at all is 0, not NaN.
        chunk: tokens per chunk. The peak is about three times ``chunk * vocabulary * 4`` bytes.

    Returns:
        The loss in float32. Differentiable once in ``hidden``, ``head_weight`` and ``bias``; the gradient of
        the weight is summed over chunks in float32.

    Raises:
        KernelArgumentError: a shape, dtype, device or option does not fit; with ``set_debug(True)`` also when
            a label lies outside the vocabulary.

    Example:
        >>> hidden = torch.eye(2, requires_grad=True)
        >>> loss = chunked_cross_entropy(hidden, torch.eye(2), torch.tensor([0, -100]), chunk=1)
        >>> loss.backward()
        >>> loss.detach(), hidden.grad
        (tensor(0.3133), tensor([[-0.2689,  0.2689],
                [ 0.0000,  0.0000]]))
    """
    _check_head("hidden", hidden, "head_weight", head_weight, bias)
    _check_options(softcap, reduction, chunk)
    check_device("labels", labels, hidden, "hidden")
    check_shape("labels", labels, hidden.shape[:-1], "the leading dimensions of hidden")
    if labels.dtype != torch.int64:
        raise KernelArgumentError.of(
            "labels must be token ids", got=labels.dtype, allowed="int64", remedy="call labels.long()"
        )
    targets = labels.reshape(-1)
    counted = targets != ignore_index
    if debugging():
        _check_label_values(targets[counted], head_weight.shape[0])
    flat = hidden.reshape(-1, hidden.shape[-1])
    safe = torch.where(counted, targets, 0)
    losses = ChunkedCrossEntropy.apply(flat, head_weight, bias, safe, softcap, chunk)
    return _reduce(losses, counted, reduction).view(labels.shape if reduction == "none" else ())


def chunked_kl(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    teacher_logits: Tensor | None = None,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    reduction: str = "mean",
    chunk: int = 1024,
) -> Tensor:
    """Distillation loss ``KL(teacher || student)`` over the vocabulary, a chunk of tokens at a time.

    Both distributions are softened by ``temperature`` and the loss is multiplied by its square (arXiv
    1503.02531). The teacher is given by its last hidden states, whose logits then exist one chunk at a
    time too, or by finished logits. No gradient flows to the teacher.

    Args:
        hidden: ``[..., hidden]`` of the student.
        head_weight: ``[vocabulary, hidden]`` in the dtype of ``hidden``.
        teacher_logits: ``[..., vocabulary]``, used as they are (after any softcap); finite.
        teacher_hidden: ``[..., teacher hidden]``, instead of ``teacher_logits``.
        teacher_weight: ``[vocabulary, teacher hidden]``; None means that the teacher has the student's head,
            weight and bias (self-distillation).
        teacher_bias: ``[vocabulary]``, with ``teacher_weight`` only.
        bias: ``[vocabulary]`` of the student's head, or None.
        softcap: ``softcap * tanh(logits / softcap)`` on the student's logits, and on the teacher's where they
            are computed from ``teacher_hidden``.
        temperature: positive.
        mask: ``[...]`` bool, True at positions that count; None for all.
        reduction: ``"mean"`` over the counted positions, ``"sum"``, or ``"none"`` for ``[...]`` losses with
            zeros elsewhere. The mean over no position at all is 0, not NaN.
        chunk: tokens per chunk. The peak is about four times ``chunk * vocabulary * 4`` bytes.

    Returns:
        The loss in float32. Differentiable once in ``hidden``, ``head_weight`` and ``bias``; the gradient of
        the weight is summed over chunks in float32.

    Raises:
        KernelArgumentError: a shape, dtype, device or option does not fit, or not exactly one of
            ``teacher_logits`` and ``teacher_hidden`` is given.

    Example:
        >>> hidden, head = torch.eye(2), torch.eye(2)
        >>> chunked_kl(hidden, head, teacher_hidden=hidden)
        tensor(0.)
        >>> chunked_kl(hidden, head, teacher_logits=torch.zeros(2, 2))
        tensor(0.1201)
    """
    _check_head("hidden", hidden, "head_weight", head_weight, bias)
    _check_options(softcap, reduction, chunk)
    check_positive("temperature", temperature)
    teacher, teacher_weight, teacher_bias = _teacher(
        hidden, head_weight, bias, teacher_logits, teacher_hidden, teacher_weight, teacher_bias
    )
    if mask is not None:
        check_device("mask", mask, hidden, "hidden")
        check_shape("mask", mask, hidden.shape[:-1], "the leading dimensions of hidden")
        if mask.dtype != torch.bool:
            raise KernelArgumentError.of(
                "mask must be bool",
                got=mask.dtype,
                allowed="torch.bool, True at counted positions",
                remedy="call mask.bool()",
            )
    flat = hidden.reshape(-1, hidden.shape[-1])
    losses = ChunkedKL.apply(
        flat,
        head_weight,
        bias,
        teacher.reshape(-1, teacher.shape[-1]),
        teacher_weight,
        teacher_bias,
        softcap,
        temperature,
        chunk,
    )
    counted = losses.new_ones(losses.shape, dtype=torch.bool) if mask is None else mask.reshape(-1)
    return _reduce(losses, counted, reduction).view(hidden.shape[:-1] if reduction == "none" else ())


def cross_entropy_reference(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Unchunked losses ``[n]`` of ``hidden [n, hidden]``, all logits at once: the oracle of the tests."""
    logits = head_logits(hidden, head_weight, bias, softcap)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")


def kl_reference(
    hidden: Tensor,
    head_weight: Tensor,
    teacher_logits: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Unchunked losses ``[n]`` of ``hidden [n, hidden]``, all logits at once: the oracle of the tests."""
    student = (head_logits(hidden, head_weight, bias, softcap) / temperature).log_softmax(-1)
    teacher = (teacher_logits.to(student.dtype) / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * temperature**2


def _reduce(losses: Tensor, counted: Tensor, reduction: str) -> Tensor:
    losses = torch.where(counted, losses, 0.0)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / counted.sum().clamp(min=1) if reduction == "mean" else total


def _teacher(
    hidden: Tensor,
    head_weight: Tensor,
    bias: Tensor | None,
    logits: Tensor | None,
    teacher_hidden: Tensor | None,
    weight: Tensor | None,
    teacher_bias: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the teacher's logits, or its hidden states with the head to use; detached and checked."""
    if logits is not None and teacher_hidden is None and weight is None and teacher_bias is None:
        check_floating("teacher_logits", logits)
        check_device("teacher_logits", logits, hidden, "hidden")
        check_shape("teacher_logits", logits, (*hidden.shape[:-1], head_weight.shape[0]), "[..., vocabulary]")
        return logits.detach(), None, None
    if logits is not None or teacher_hidden is None or (weight is None and teacher_bias is not None):
        given = {"logits": logits, "hidden": teacher_hidden, "weight": weight, "bias": teacher_bias}
        raise KernelArgumentError.of(
            "the teacher is not given in one way",
            got=", ".join(f"teacher_{name}" for name, value in given.items() if value is not None)
            or "nothing",
            allowed="teacher_logits alone, or teacher_hidden with or without its own head",
            remedy="pass one of the two",
        )
    if weight is None:
        weight, teacher_bias = head_weight, bias
    _check_head("teacher_hidden", teacher_hidden, "teacher_weight", weight, teacher_bias)
    check_device("teacher_hidden", teacher_hidden, hidden, "hidden")
    check_shape(
        "teacher_hidden",
        teacher_hidden,
        (*hidden.shape[:-1], weight.shape[1]),
        "[..., hidden] at the same tokens",
    )
    check_shape(
        "teacher_weight", weight, (head_weight.shape[0], weight.shape[1]), "[vocabulary, teacher hidden]"
    )
    return teacher_hidden.detach(), weight.detach(), None if teacher_bias is None else teacher_bias.detach()


def _check_head(name: str, hidden: Tensor, weight_name: str, weight: Tensor, bias: Tensor | None) -> None:
    check_floating(name, hidden)
    if hidden.dim() == 0 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise KernelArgumentError.of(
            f"{weight_name} does not fit {name}",
            got=f"shapes {tuple(weight.shape)} and {tuple(hidden.shape)}",
            allowed="[vocabulary, hidden] and [..., hidden]",
            remedy="pass lm_head.weight and the last hidden states of one model",
        )
    check_dtype(weight_name, weight, hidden, name)
    check_device(weight_name, weight, hidden, name)
    if bias is not None:
        check_dtype("the head's bias", bias, hidden, name)
        check_device("the head's bias", bias, hidden, name)
        check_shape("the head's bias", bias, weight.shape[:1], "[vocabulary]")


def _check_options(softcap: float | None, reduction: str, chunk: int) -> None:
    check_choice("reduction", reduction, _REDUCTIONS)
    check_positive("chunk", chunk)
    if softcap is not None:
        check_positive("softcap", softcap)


def _check_label_values(labels: Tensor, vocabulary: int) -> None:
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= vocabulary):
        raise KernelArgumentError.of(
            "labels lie outside the vocabulary",
            got=f"{int(labels.min())} to {int(labels.max())}",
            allowed=f"0 to {vocabulary - 1}, or ignore_index",
            remedy="mark positions without a loss by ignore_index",
        )

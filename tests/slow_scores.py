"""Changed attention scores the slow, obvious way: a full score matrix of every head."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

# Makes scores [batch, heads, queries, keys] from the module, queries and keys, and the model's own factor.
Score = Callable[[nn.Module, Tensor, Tensor, float], Tensor]
_NAME = "slow_scores"


@contextlib.contextmanager
def slow_scores(model: PreTrainedModel, score: Score) -> Iterator[None]:
    """Run a model with scores of the test's own; masks, softmax and values as in any attention."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = score(module, query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
        # transformers 5.16 leaves the cap out of its SDPA function, and Gemma 2 runs with that.
        if softcap is not None and had != "sdpa":
            scores = softcap * torch.tanh(scores / softcap)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[2]]
        weights = scores.softmax(-1)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    had = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, eager_mask)
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = had


def slow_self_extend(
    model: PreTrainedModel,
    mask: Tensor,
    causal: bool,
    group: int,
    window: int,
    trained: int,
    tau: float = 1.0,
    neighbours: bool = False,
) -> Score:
    """SelfExtend with a relative position for every pair, from queries and keys without any rotation.

    Args:
        model: The model, which rotates by the position ids of `slow_rows.arguments`.
        mask: Which tokens are text `[batch, tokens]`.
        causal: Whether it is a decoder.
        group: How many far tokens share a position.
        window: Distances below are near.
        trained: Texts up to this length are left alone.
        tau: A temperature.
        neighbours: Whether the model turns neighbouring channels together.
    """
    place = mask.cumsum(-1) - 1
    m, n = place[:, :, None], place[:, None, :]
    relative = relative_positions(m, n, group, window)
    unchanged = (m < trained) if causal else (mask.sum(1) <= trained)[:, None, None]
    relative = torch.where(unchanged, m - n, relative)
    at = place.clamp_min(0) if causal else torch.arange(mask.shape[1]).expand_as(place)
    rotary = getattr(model, "model", getattr(model, "gpt_neox", model)).rotary_emb

    def score(module: nn.Module, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        if getattr(module, "sliding_window", None) is not None:
            return query @ key.mT * scaling
        theta = rotary.inv_freq if hasattr(rotary, "inv_freq") else rotary.full_attention_inv_freq
        back = -at[:, None, :, None] * theta
        (q1, q2, q_rest), (k1, k2, k_rest) = (_parts(t, back, neighbours) for t in (query, key))
        angle = relative[:, None, :, :, None] * theta
        even = q1[:, :, :, None] * k1[:, :, None] + q2[:, :, :, None] * k2[:, :, None]
        odd = q1[:, :, :, None] * k2[:, :, None] - q2[:, :, :, None] * k1[:, :, None]
        turned = (angle.cos() * even + angle.sin() * odd).sum(-1)
        return (turned + q_rest @ k_rest.mT) * scaling / tau

    return score


def relative_positions(m: Tensor, n: Tensor, group: int, window: int) -> Tensor:
    """The published rule, with its mirror image for keys ahead of the query."""
    shift = window - window // group
    grouped = m // group - n // group + torch.where(m > n, shift, -shift)
    return torch.where((m - n).abs() < window, m - n, grouped)


def _parts(x: Tensor, angle: Tensor, neighbours: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The two of each pair of rotated channels, turned by an angle, and the channels that are not rotated."""
    half = angle.shape[-1]
    rotated, rest = x[..., : 2 * half], x[..., 2 * half :]
    first, second = (rotated[..., ::2], rotated[..., 1::2]) if neighbours else rotated.chunk(2, -1)
    return first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin(), rest

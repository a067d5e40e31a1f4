"""Attention modules that compute their scores themselves, as MPNet's do: their own computation, with changed scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slimformer.calls.texts import current_texts
from slimformer.model.anatomy import in_eval_mode
from slimformer.rows.scores import Scores

# MPNet's projections and dropout.
_CHILDREN = {"q", "k", "v", "o", "dropout"}


@dataclass
class ScoredAttention:
    """Stands in for the `forward` of such a module.

    Attributes:
        core: The module, with projections `q`, `k`, `v`, `o` and an additive score bias.
        scores: What is changed.
        runs_by_parts: That row attention, which reads the same scores, may call the module's layers one by one.
    """

    core: nn.Module
    scores: Scores
    runs_by_parts: ClassVar[bool] = True

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        """The module's output `[batch, tokens, hidden]`, and its weights if asked for.

        Args:
            hidden_states: `[batch, tokens, hidden]`.
            attention_mask: What is added to scores, `[batch, 1, 1 or tokens, tokens]`.
            position_bias: What is added too, and counts as part of the scores, `[batch, heads, tokens, tokens]`.
            output_attentions: Whether to return the weights.
            kwargs: Ignored, as by the module.
        """
        batch, tokens, _ = hidden_states.shape
        factors = self.scores.factors(current_texts(batch, tokens, hidden_states.device))
        if factors is None and self.scores.scale == 1.0:
            own: tuple[Tensor, ...] = type(self.core).forward(
                self.core, hidden_states, attention_mask, position_bias, output_attentions=output_attentions
            )
            return own
        core: Any = self.core
        width = int(core.attention_head_size)
        q, k, v = (
            getattr(core, name)(hidden_states).view(batch, tokens, -1, width).transpose(1, 2)
            for name in "qkv"
        )
        logits = q @ k.mT * width**-0.5
        if position_bias is not None:
            logits = logits + position_bias
        logits = logits * self.scores.scale
        if factors is not None:
            logits = (logits * factors.view(batch, 1, tokens, 1)).to(q.dtype)
        if attention_mask is not None:
            logits = logits + attention_mask
        weights = core.dropout(logits.softmax(-1))
        output = core.o((weights @ v).transpose(1, 2).flatten(2))
        return (output, weights) if output_attentions else (output,)


def computes_scores_itself(core: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether a module is one of these, by the names of its parts and by its result on a short call.

    Args:
        core: The attention module.
        hidden: An input `[batch, tokens, hidden]`.
        kwargs: The arguments of its layer.
    """
    if {name for name, _ in core.named_children()} != _CHILDREN:
        return False
    # A scale that is 1 up to rounding: at exactly 1 the module's own forward would be compared with itself.
    trial = ScoredAttention(core, Scores(None, False, 1.0 + 2.0**-20))
    with torch.no_grad(), in_eval_mode(core):
        expected, actual = core(hidden, **kwargs)[0], trial.forward(hidden, **kwargs)[0]
    error = (actual - expected).float().norm() / expected.float().norm()
    return bool(error <= (1e-4 if expected.dtype == torch.float32 else 3e-2))

"""Compute no layer above a chosen one; a linear head may stand for them (2D Matryoshka, arXiv 2402.14776)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimformer.decisions.fields import checked_weights, checked_width, is_whole
from slimformer.decisions.policy import Decision, Replacement
from slimformer.decisions.registry import register
from slimformer.decisions.replacements import LinearFilter, weight_names
from slimformer.errors import PlanError
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind

HEAD = ("head.weight", "head.bias")


@register("EarlyExit")
@dataclass(frozen=True)
class EarlyExit:
    """No sublayer from `layer` on computes a token; the stack's final norm, the pooling and any head stay.

    The width of an embedding is sentence-transformers' own matter: `truncate_dim`.

    Attributes:
        layer: How many layers run. Layer `layer` is the first that does not.
        weights: Nothing, or a linear head as `slimformer.calibrate` fits it: `"head.weight"`
            `[hidden, hidden]` and `"head.bias"` `[hidden]`. The residual `x` at the exit becomes
            `x + W norm(x) + b`, where `norm` is what the last layer's MLP has in front of it: nothing in post-norm
            encoders such as BERT. A pooling whose weights sum to one, as the mean and [CLS] do, carries that over from
            tokens to embeddings.

    Raises:
        PlanError: If `layer` is not an integer from 0 up, or the head is not whole or of another shape.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> import slimformer
        >>> config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        ...                     num_attention_heads=2)
        >>> model = slimformer.patch(BertModel(config), EarlyExit(layer=2))
        >>> slimformer.status(model)[2]
        {'attention': 'dropped', 'mlp': 'dropped'}
    """

    layer: int
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not is_whole(self.layer, least=0):
            raise PlanError(
                f"EarlyExit(layer=...) takes the number of layers that run, from 0 up, got {self.layer!r}."
            )
        checked_weights("EarlyExit", self.weights)
        if not self.weights:
            return
        if set(self.weights) != set(HEAD):
            raise PlanError(
                f"EarlyExit(weights=...) takes {' and '.join(HEAD)} or nothing, got {', '.join(sorted(self.weights))}. "
                "slimformer.calibrate(model, None, EarlyExit(layer)) fits them."
            )
        matrix, bias = (self.weights[name] for name in HEAD)
        if bias.dim() != 1 or tuple(matrix.shape) != (bias.numel(), bias.numel()):
            raise PlanError(
                f"The head of EarlyExit must be [hidden, hidden] and [hidden]; got {tuple(matrix.shape)} and "
                f"{tuple(bias.shape)}."
            )

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """No rows from the exit on; the last sublayer leaves the head."""
        count = len(anatomy.layers)
        name = type(anatomy.stack).__name__
        if self.layer >= count:
            raise PlanError(
                f"EarlyExit(layer={self.layer}) leaves nothing out: {name} has {count} layers. Allowed are 0 to "
                f"{count - 1}."
            )
        plans: dict[tuple[int, Kind], Decision] = {
            (index, kind): Decision(compute=False) for index in range(self.layer, count) for kind in KINDS
        }
        if self.weights:
            size = self.weights["head.bias"].numel()
            checked_width("The head of EarlyExit", size, anatomy.stack.config.hidden_size, name)
            weights = dict(zip(weight_names("mlp"), (self.weights[part] for part in HEAD), strict=True))
            plans[count - 1, "mlp"] = Decision(False, _head, weights)
        return plans

    def tensors(self) -> dict[str, Tensor]:
        """What a plan saves beside the JSON."""
        return dict(self.weights)

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return {"layer": self.layer}


def _head(layer: nn.Module, causal: bool, slot: int) -> Replacement:
    return LinearFilter(layer, "mlp", 1, causal, slot)

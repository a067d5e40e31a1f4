"""Sharper attention: one temperature for all scores (TempScale, arXiv 2410.24200), or one that grows with length."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimformer.calls.texts import Texts
from slimformer.decisions.fields import is_number
from slimformer.decisions.registry import register
from slimformer.errors import PlanError
from slimformer.transforms.transform import Attentions, checked_length


@register("TempScale")
@dataclass(frozen=True)
class TempScale:
    """Attention weights are `softmax(scores / tau)`, in all layers and heads, at every length.

    Below 1 attention is sharper, which counters how embeddings of long texts grow alike; the paper sweeps 1, 0.95, 0.9,
    0.85, 0.8 and 0.7 on held-out data. A score bias such as MPNet's is divided too. Where a model caps its scores
    (Gemma 2), the temperature acts before the cap.

    Attributes:
        tau: The temperature; 1 changes nothing.

    Raises:
        PlanError: If `tau` is not a number above 0.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> import slimformer
        >>> config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                     num_attention_heads=2)
        >>> model = slimformer.patch(BertModel(config), TempScale(tau=0.9))
        >>> slimformer.status(model)[0]["attention"]
        'text rows, TempScale(tau=0.9)'
    """

    tau: float

    def __post_init__(self) -> None:
        # Beyond, scores leave the range of half precision, and those of the smallest numbers that of every other.
        if not is_number(self.tau) or not 1e-4 <= self.tau <= 1e4:
            raise PlanError(
                f"TempScale(tau=...) takes a number above 0, got {self.tau!r}. Below 1 attention is sharper; "
                "0.7 to 1 are worth a try, and 0.0001 to 10000 allowed."
            )

    def transform_attention(self, attentions: Attentions) -> dict[int, str]:
        """Every layer's scores divided by the temperature.

        Raises:
            UnsupportedModelError: If an attention would ignore it.
        """
        for index in attentions.layers:
            attentions.scale(index, 1 / self.tau)
        return dict.fromkeys(attentions.layers, repr(self))

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return dataclasses.asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}


@register("LogNScale")
@dataclass(frozen=True)
class LogNScale:
    """Queries grow with the logarithm of the length: as many keys as before then get most of the attention.

    In an encoder every query of a text of n tokens, padding not counted, is multiplied by `max(1, ln n / ln L0)`; in a
    decoder the query at position p by `max(1, ln(p + 1) / ln L0)`, whatever follows. Texts of up to L0 tokens are
    computed as without it, bit for bit. Layers with a sliding window are left alone: they see no more keys than ever.

    Attributes:
        base_length: L0, the length from which on queries grow; usually the length that the model was trained for.

    Raises:
        PlanError: If `base_length` is not a whole number from 2 up.

    Example:
        >>> LogNScale(base_length=512).settings()
        {'base_length': 512}
    """

    base_length: int

    def __post_init__(self) -> None:
        checked_length("LogNScale", "base_length", self.base_length, least=2)

    def transform_attention(self, attentions: Attentions) -> dict[int, str]:
        """Factors on the queries of every layer that sees all of a text.

        Raises:
            UnsupportedModelError: If an attention would ignore them, or all layers have a sliding window.
        """
        layers = attentions.full_layers("LogNScale")
        for index in layers:
            attentions.scores(index).query_factors.append(self)
        attentions.read_texts()
        return dict.fromkeys(layers, repr(self))

    def applies(self, texts: Texts) -> bool:
        """Whether a text may be longer than the base length."""
        return texts.longest > self.base_length

    def factors(self, places: Tensor, lengths: Tensor, causal: bool) -> Tensor:
        """Factors float32 `[queries]`, from places in texts, and lengths of those texts, int64 `[queries]`."""
        counted = places + 1 if causal else lengths
        return (counted.clamp_min(1).float().log() / math.log(self.base_length)).clamp_min(1.0)

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return dataclasses.asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}

"""Longer texts for encoders with a table of positions: BERT, RoBERTa, MPNet, DistilBERT (arXiv 2404.12096)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from slimformer.decisions.registry import register
from slimformer.transforms.position_table import place_texts
from slimformer.transforms.transform import Attentions, checked_length


def checked_trained(method: Any) -> None:
    """Refuse a trained length that is none.

    Raises:
        PlanError: If it is neither None nor a whole number from 2 up.
    """
    if method.trained_length is not None:
        checked_length(type(method).__name__, "trained_length", method.trained_length, least=2)


@register("GroupedPositions")
@dataclass(frozen=True)
class GroupedPositions:
    """Neighbours share a row of the position table: the token at p has position `p // factor`.

    Only in texts longer than the model was trained for, L0; shorter ones are computed as without it, bit for bit. A
    text's positions depend on its own length only, and `factor` is that of the plan, not of the batch.

    A tokenizer that cuts texts off (`model_max_length`, `max_seq_length` of a SentenceTransformer) has to be told the
    new length by its owner.

    Attributes:
        factor: How many tokens share a position, and how many times longer than L0 texts may be.
        trained_length: L0; None for the size of the table. Models are often trained for less: all-MiniLM-L6-v2 has 512
            positions and was trained on 256 tokens.

    Raises:
        PlanError: If a field is not a whole number that makes sense.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> import torch, slimformer
        >>> config = BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        ...                     num_attention_heads=2, max_position_embeddings=64)
        >>> model = slimformer.patch(BertModel(config), GroupedPositions(2))
        >>> model(torch.ones(1, 100, dtype=torch.int64)).last_hidden_state.shape
        torch.Size([1, 100, 16])
    """

    factor: int
    trained_length: int | None = None

    def __post_init__(self) -> None:
        checked_length("GroupedPositions", "factor", self.factor, least=2)
        checked_trained(self)

    def transform_attention(self, attentions: Attentions) -> dict[int, str]:
        """Shared rows for long texts.

        Raises:
            UnsupportedModelError: If the model has no table of positions in its embeddings.
        """
        return place_texts(self, attentions, self.factor)

    def positions(self, places: Tensor, trained: int) -> Tensor:
        """Positions of tokens at `places` of a long text, int64 like them."""
        return places.div(self.factor, rounding_mode="floor")

    def remedy(self, tokens: int, trained: int) -> str:
        """What reaches a text of so many tokens."""
        return f"GroupedPositions(factor={math.ceil(tokens / trained)}) reaches that, RecurrentPositions() any length."

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return dataclasses.asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}


@register("PositionInterpolation")
@dataclass(frozen=True)
class PositionInterpolation:
    """Positions in between: the token at p has position `p / factor`, interpolated between two rows of the table.

    For texts longer than L0, as `GroupedPositions`, whose remarks hold here too.

    Attributes:
        factor: How many times longer than L0 texts may be.
        trained_length: L0; None for the size of the table.

    Raises:
        PlanError: If a field is not a whole number that makes sense.

    Example:
        >>> PositionInterpolation(4, trained_length=256).settings()
        {'factor': 4, 'trained_length': 256}
    """

    factor: int
    trained_length: int | None = None

    def __post_init__(self) -> None:
        checked_length("PositionInterpolation", "factor", self.factor, least=2)
        checked_trained(self)

    def transform_attention(self, attentions: Attentions) -> dict[int, str]:
        """Interpolated rows for long texts.

        Raises:
            UnsupportedModelError: If the model has no table of positions in its embeddings.
        """
        return place_texts(self, attentions, self.factor)

    def positions(self, places: Tensor, trained: int) -> Tensor:
        """Positions of tokens at `places` of a long text, float32; behind the last row of the table there is none."""
        return (places / self.factor).clamp_max(trained - 1)

    def remedy(self, tokens: int, trained: int) -> str:
        """What reaches a text of so many tokens."""
        needed = math.ceil(tokens / trained)
        return f"PositionInterpolation(factor={needed}) reaches that, RecurrentPositions() any length."

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return dataclasses.asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}


@register("RecurrentPositions")
@dataclass(frozen=True)
class RecurrentPositions:
    """Positions start again: the token at p has position `p mod L0`. Texts of any length.

    For texts longer than L0, as `GroupedPositions`, whose remarks hold here too.

    Attributes:
        trained_length: L0; None for the size of the table.

    Raises:
        PlanError: If the field is not a whole number that makes sense.

    Example:
        >>> RecurrentPositions().settings()
        {'trained_length': None}
    """

    trained_length: int | None = None

    def __post_init__(self) -> None:
        checked_trained(self)

    def transform_attention(self, attentions: Attentions) -> dict[int, str]:
        """Repeated rows for long texts.

        Raises:
            UnsupportedModelError: If the model has no table of positions in its embeddings.
        """
        return place_texts(self, attentions, math.inf)

    def positions(self, places: Tensor, trained: int) -> Tensor:
        """Positions of tokens at `places` of a long text, int64 like them."""
        return places.remainder(trained)

    def remedy(self, tokens: int, trained: int) -> str:
        """Never asked for: any text is reached."""
        return "Texts of any length are read."

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return dataclasses.asdict(self)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}

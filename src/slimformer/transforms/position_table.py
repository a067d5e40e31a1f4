"""Rows of a position table for texts that are longer than the table, chosen by each text's own length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimformer.calls.texts import current_texts
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.model.anatomy import named_arguments, positional_names
from slimformer.transforms.transform import Attentions, position_offset


class Placement(Protocol):
    """Says at which position of the table each token of a long text stands."""

    @property
    def trained_length(self) -> int | None:
        """The length up to which nothing changes; None for the size of the table."""
        ...

    def positions(self, places: Tensor, trained: int) -> Tensor:
        """Positions below `trained`, whole or in between, of tokens at `places` of their text."""
        ...

    def remedy(self, tokens: int, trained: int) -> str:
        """What to do about a text of so many tokens that is too long."""
        ...


def place_texts(placement: Placement, attentions: Attentions, times: float) -> dict[int, str]:
    """Let a model's embeddings place the tokens of long texts.

    Args:
        placement: How.
        attentions: The model's.
        times: How many times longer than the trained length texts may be.

    Returns:
        What `status` reports for every layer.

    Raises:
        UnsupportedModelError: If the model has no table of positions in its embeddings.
        PlanError: If the trained length is more than the table holds, or another method changes positions too.
    """
    owner, stack = type(placement).__name__, attentions.anatomy.stack
    embeddings = getattr(stack, "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    kind = getattr(stack.config, "position_embedding_type", None) or "absolute"
    if not isinstance(embeddings, nn.Module) or not isinstance(table, nn.Embedding) or kind != "absolute":
        has = "rotary positions" if hasattr(stack, "rotary_emb") else "none there"
        raise UnsupportedModelError(
            f"{owner} needs a table of positions in the embeddings, as BERT, RoBERTa, MPNet and DistilBERT have it; "
            f"{type(stack).__name__} has {has}. RopeScaling and SelfExtend work on rotary positions."
        )
    attentions.claim_positions(owner)
    offset = position_offset(attentions.anatomy)
    rows, trained = table.num_embeddings - offset, placement.trained_length
    trained = rows if trained is None else trained
    if trained > rows:
        raise PlanError(
            f"{owner}(trained_length={trained}) is more than the {rows} positions that {type(stack).__name__} has."
        )
    standing_in = PlacedEmbeddings(placement, positional_names(embeddings), offset, trained, trained * times)
    lookup = InterpolatedRows(table)
    attentions.read_texts(trained * times)
    lookup.had = attentions.ledger.set_forward(table, lookup.forward)
    standing_in.had = attentions.ledger.set_forward(embeddings, standing_in.forward)
    reach = f"up to {int(trained * times)} tokens" if times < float("inf") else "texts of any length"
    own = f"factor={times}" if times < float("inf") else ""
    return dict.fromkeys(attentions.layers, f"{owner}({own}), {reach}")


@dataclass
class PlacedEmbeddings:
    """Stands in for the `forward` of a model's embeddings.

    Attributes:
        placement: Where tokens of long texts stand.
        names: The positional parameters of the embeddings' `forward`.
        offset: The row of the table for the first token.
        trained: The length up to which nothing changes.
        capacity: The longest text.
        had: The embeddings' own `forward`.
    """

    placement: Placement
    names: tuple[str, ...]
    offset: int
    trained: int
    capacity: float
    had: Callable[..., Tensor] = field(init=False)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The embeddings' own `forward`, with position ids where a text is long; the same arguments.

        Raises:
            DataError: If a text is longer than the method reaches.
        """
        given = named_arguments(self.names, args, kwargs)
        source = given.get("input_ids")
        source = given["inputs_embeds"] if source is None else source
        batch, tokens = source.shape[:2]
        texts = current_texts(batch, tokens, source.device)
        if texts.longest <= self.trained:
            return self.had(*args, **kwargs)
        texts.check_longer_than(
            self.trained, self.capacity, partial(self.placement.remedy, trained=self.trained)
        )
        places = texts.places()
        if given.get("position_ids") is not None:
            places = given["position_ids"].expand(batch, tokens) - self.offset
        # Padding stands wherever there is a row for it.
        places = places.clamp_min(0)
        positions = self.placement.positions(places, self.trained)
        long = (texts.lengths > self.trained)[:, None]
        positions = torch.where(long, positions, places).clamp_max(self.trained - 1)
        given["position_ids"] = positions + self.offset
        if "token_type_ids" in self.names and given.get("token_type_ids") is None:
            # Read from a buffer by position id, which may lie between two rows.
            given["token_type_ids"] = torch.zeros(batch, tokens, dtype=torch.int64, device=source.device)
        return self.had(**given)


@dataclass
class InterpolatedRows:
    """Stands in for the `forward` of a position table, and takes positions between two rows.

    Attributes:
        table: The table.
        had: Its own `forward`.
    """

    table: nn.Embedding
    had: Callable[[Tensor], Tensor] = field(init=False)

    def forward(self, input: Tensor) -> Tensor:
        """Rows `[..., hidden]` at whole positions, or between two of them at float positions `[...]`."""
        if not input.is_floating_point():
            return self.had(input)
        weight = self.table.weight
        below = input.floor().long()
        first = F.embedding(below, weight)
        second = F.embedding((below + 1).clamp_max(weight.shape[0] - 1), weight)
        return torch.lerp(first, second, (input - below).unsqueeze(-1).to(weight.dtype))

"""How much a token of a text still matters at a layer: by attention, by its keys, by a learned predictor, by chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slimformer.errors import PlanError
from slimformer.methods.elimination.block_predictor import BLOCK, BlockPredictor
from slimformer.methods.elimination.random_keep import chances
from slimformer.rows.attention import RowAttention
from slimformer.rows.stream import Stream

# Queries that ask, and how many neighbours share a score: FastKV's.
LAST_QUERIES, NEIGHBOURS = 8, 7
# Queries that stand for all of a text.
SPREAD_QUERIES = 64


@dataclass(frozen=True)
class TextTokens:
    """Which tokens of a batch are text.

    Attributes:
        here: Those still in the stream, bool `[batch, tokens]`.
        place: The place of every token in its text, from 0 up, int64 `[batch, tokens]`.
        length: Tokens of every text, those that left included, int64 `[batch]`.
    """

    here: Tensor
    place: Tensor
    length: Tensor


# A number per token, float32 `[batch, tokens]`, from the stream, its residual `[rows, hidden]` and its texts; higher
# ones stay. Where a text may be measured against its mean, no number is negative.
TokenScore = Callable[[Stream, Tensor, TextTokens], Tensor]


@dataclass(frozen=True)
class ByChance:
    """Scores that say nothing, to compare with.

    Attributes:
        seed: Another seed, other scores.
    """

    seed: int

    def __call__(self, stream: Stream, x: Tensor, text: TextTokens) -> Tensor:
        """As `TokenScore`."""
        return chances(text.place.flatten(), self.seed).view_as(text.place).float()


@dataclass(frozen=True)
class ByAttention:
    """The attention that a token gets, summed over the queries that ask.

    Attributes:
        asking: `"last"` or `"all"`; None for what suits the model.
        heads: `"sum"` or `"max"` over heads.
    """

    asking: str | None
    heads: str

    def __call__(self, stream: Stream, x: Tensor, text: TextTokens) -> Tensor:
        """As `TokenScore`."""
        attention, h = _attention_and_input(stream, x, "attention")
        if (self.asking or _default_asking(stream)) == "last":
            token = torch.arange(stream.tokens, device=x.device)
            count = min(LAST_QUERIES, stream.tokens)
            # The last tokens of every text ask, wherever its padding is.
            queries = torch.where(text.here, token, -1).topk(count, dim=1).values
        else:
            queries = _spread(text.here)
        scores = attention.scores(h, stream, queries, text.here, self.heads)
        return _pooled(scores) / _pooled(text.here.float()).clamp_min(1e-6)


def by_key_norm(stream: Stream, x: Tensor, text: TextTokens) -> Tensor:
    """Small keys stay: large ones belong to tokens that little attends to."""
    attention, h = _attention_and_input(stream, x, "norm")
    return -attention.key_norms(h, stream)


@dataclass(eq=False)
class ByPredictor:
    """What a trained predictor says of the block that a token is in, before the layer computes anything.

    Attributes:
        predictor: The predictor, moved to where it is asked.
        asking: As `ByAttention`'s.
    """

    predictor: BlockPredictor
    asking: str | None

    def __call__(self, stream: Stream, x: Tensor, text: TextTokens) -> Tensor:
        """As `TokenScore`."""
        predictor = self.predictor
        if predictor.near.device != x.device:
            self.predictor = predictor = predictor.to(x.device)
        matrix = predictor(_layer_input(stream, x), text.here, text.place).float().relu()
        blocks = torch.arange(matrix.shape[1], device=x.device)
        last = (text.length - 1).div(BLOCK, rounding_mode="floor")[:, None]
        asks = (blocks >= last - 1) & (blocks <= last)
        if (self.asking or _default_asking(stream)) == "all":
            asks = blocks <= last
        matrix = matrix * asks[:, :, None]
        if stream.causal:
            matrix = matrix.tril()
        return matrix.sum(1).gather(1, (text.place // BLOCK).clamp_max(matrix.shape[1] - 1))


def _default_asking(stream: Stream) -> str:
    return "last" if stream.causal else "all"


def _attention_and_input(stream: Stream, x: Tensor, scorer: str) -> tuple[RowAttention, Tensor]:
    """The layer's attention, and what it reads: the normed residual of all tokens `[batch * tokens, hidden]`."""
    attention = None if stream.layer is None else stream.layer.attention
    if attention is None:
        raise PlanError(
            f"TokenElimination(scorer={scorer!r}) reads the layer's keys, and this model's attention has projections "
            "that are not known. Only the scorers 'random' and 'predictor' work with it."
        )
    return attention, _layer_input(stream, x).flatten(0, 1)


def _layer_input(stream: Stream, x: Tensor) -> Tensor:
    """The normed residual `[batch, tokens, hidden]`, zeros at tokens that left."""
    h = x if stream.layer is None else stream.layer.heads_input(stream, x)
    return stream.padded(h).view(stream.batch, stream.tokens, -1)


def _spread(here: Tensor) -> Tensor:
    """Tokens at equal distances in every text, the first and the last among them, int64 `[batch, asking]`."""
    count = here.sum(1, keepdim=True)
    step = torch.linspace(0, 1, min(SPREAD_QUERIES, here.shape[1]), device=here.device)
    wanted = (step * (count - 1).clamp_min(0)).round().long() + 1
    return torch.where(count > 0, torch.searchsorted(here.cumsum(1), wanted), -1)


def _pooled(score: Tensor) -> Tensor:
    return F.avg_pool1d(score[:, None], NEIGHBOURS, 1, NEIGHBOURS // 2)[:, 0]

"""Stop computing tokens that no longer matter, from a middle layer on (LeMo, arXiv 2501.09767; FastKV's selection)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from slimformer.anatomy import Anatomy, Kind
from slimformer.cache import layer_cache
from slimformer.errors import PlanError
from slimformer.executor import SublayerPlan
from slimformer.methods.random_keep import chances
from slimformer.rows import Rows
from slimformer.stream import Stream

SCORERS = ("attention", "norm", "random")
# Queries that ask, and how many neighbours share a score: FastKV's.
_ASKING, _POOLED = 8, 7


@dataclass(frozen=True)
class TokenElimination:
    """Tokens of a prompt leave the model at chosen layers: no later layer computes them or keeps their keys.

    A token's residual stays as it was when it left. Positions stay the original ones. Decode steps, and prompts of
    fewer than `least` tokens, compute every token.

    Attributes:
        schedule: Layer to the fraction of the text's tokens that stays from it on; fractions never grow.
        scorer: Who stays: those that the last 8 tokens attend to (`"attention"`), those with small keys (`"norm"`), or
            by chance (`"random"`, to compare with).
        block: Tokens come and go in blocks of so many neighbours.
        sink: The first tokens always stay.
        window: The last tokens always stay.
        least: The shortest text from which tokens leave.
        seed: For `"random"`.

    Raises:
        PlanError: If a field is not one of those allowed, or the schedule grows.

    Example:
        >>> TokenElimination({15: 0.5, 20: 0.25}).schedule
        {15: 0.5, 20: 0.25}
    """

    schedule: Mapping[int, float]
    scorer: Literal["attention", "norm", "random"] = "attention"
    block: int = 1
    sink: int = 4
    window: int = 64
    least: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.schedule:
            raise PlanError("TokenElimination(schedule=...) takes at least one layer and fraction, got none.")
        before = 1.0
        # JSON has only text for keys.
        given = {int(k) if isinstance(k, str) and k.isdigit() else k: v for k, v in self.schedule.items()}
        ordered = dict(sorted(given.items()))
        for layer, keep in ordered.items():
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 1:
                raise PlanError(
                    f"TokenElimination(schedule=...) takes layers from 1 up, since positions are counted in the "
                    f"cache of layer 0; got {layer!r}."
                )
            if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
                raise PlanError(
                    f"TokenElimination(schedule=...) takes fractions above 0 and up to 1, got {layer}: {keep!r}."
                )
            if keep > before:
                raise PlanError(
                    f"TokenElimination(schedule=...) keeps {keep} from layer {layer} on and {before} before: tokens "
                    "that have left do not come back. Fractions must not grow."
                )
            before = keep
        object.__setattr__(self, "schedule", ordered)
        if self.scorer not in SCORERS:
            raise PlanError(
                f"TokenElimination(scorer=...) takes one of {', '.join(SCORERS)}, got {self.scorer!r}."
            )
        for name, least in (("block", 1), ("sink", 0), ("window", 1), ("least", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PlanError(
                    f"TokenElimination({name}=...) takes a number from {least} up, got {value!r}."
                )

    def sublayer_plans(self, anatomy: Anatomy) -> dict[tuple[int, Kind], SublayerPlan]:
        """A selection before the attention of every layer in the schedule.

        Raises:
            PlanError: If a layer does not exist, or one from the first on has a sliding window: distances in it would
                be counted without the tokens that left.
        """
        count = len(anatomy.layers)
        for layer in self.schedule:
            if layer >= count:
                raise PlanError(
                    f"TokenElimination names layer {layer}, but {type(anatomy.stack).__name__} has {count} layers: "
                    f"allowed are 1 to {count - 1}."
                )
        first = min(self.schedule)
        sliding = [i for i in range(first, count) if "sliding" in anatomy.layer_types[i]]
        if sliding:
            raise PlanError(
                f"TokenElimination from layer {first} on reaches layers with a sliding window ({sliding}), which "
                f"would see further back than they were trained to. {type(anatomy.stack).__name__} is not supported."
            )
        return {
            (layer, "attention"): SublayerPlan(staying=(_Selection(self, keep),), leave_caches=True)
            for layer, keep in self.schedule.items()
        }

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return {**dataclasses.asdict(self), "schedule": {str(k): v for k, v in self.schedule.items()}}

    def tensors(self) -> dict[str, Tensor]:
        """Nothing is learned."""
        return {}


@dataclass(frozen=True)
class _Selection:
    """Which rows of the stream stay at one layer."""

    of: TokenElimination
    keep: float

    def __call__(self, stream: Stream, x: Tensor) -> Rows | None:
        """Rows of the residual `x` `[rows, hidden]`; None if all stay."""
        if stream.tokens < self.of.least or self.keep == 1.0:
            return None
        if getattr(layer_cache(stream.arguments), "is_compileable", False):
            raise PlanError(
                "Tokens cannot be eliminated from a static cache, whose layers all have one length. Use a DynamicCache."
            )
        padding = stream.padding_mask()
        here = padding if stream.held is None else padding & stream.held.mask.view_as(padding)
        length = padding.sum(1)
        # Counted in the whole text, so that a schedule says what it means whatever left before.
        target = (length * self.keep).ceil().clamp(min=1)
        target = torch.where(length < self.of.least, length, target)
        place = (padding.cumsum(1) - 1).clamp_min(0)
        protected = here & ((place < self.of.sink) | (place >= length[:, None] - self.of.window))
        score = self._scores(stream, x, here, place, length)
        if self.of.block > 1:
            score = _by_block(score, here, place, self.of.block)
        score = score.masked_fill(protected, float("inf")).masked_fill(~here, float("-inf"))
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        stay = (here & (rank < target[:, None])) | protected
        mask = stay.flatten() if stream.held is None else stay.flatten()[stream.held.index]
        return Rows(x.shape[0], given_mask=mask, leave_caches=True)

    def _scores(self, stream: Stream, x: Tensor, here: Tensor, place: Tensor, length: Tensor) -> Tensor:
        """A number per token, float32 `[batch, tokens]`; higher ones stay."""
        if self.of.scorer == "random":
            return chances(place.flatten(), self.of.seed).view_as(place).float()
        by_rows = stream.layer
        attention = None if by_rows is None else by_rows.attention
        if by_rows is None or attention is None:
            raise PlanError(
                f"TokenElimination(scorer={self.of.scorer!r}) reads the layer's keys, and this model's attention has "
                "projections that are not known. Only scorer='random' works with it."
            )
        norm = by_rows.structure.attention.norm_before
        h = stream.padded(x if norm is None else by_rows.norms(norm, x, None, False))
        if self.of.scorer == "norm":
            return -attention.key_norms(h, stream)
        # The last tokens of every text ask, wherever its padding is.
        token = torch.arange(stream.tokens, device=x.device)
        last = torch.where(here, token, -1).topk(min(_ASKING, stream.tokens), dim=1).values
        return _pooled(attention.scores(h, stream, last, here)) / _pooled(here.float()).clamp_min(1e-6)


def _pooled(score: Tensor) -> Tensor:
    return F.avg_pool1d(score[:, None], _POOLED, 1, _POOLED // 2)[:, 0]


def _by_block(score: Tensor, here: Tensor, place: Tensor, block: int) -> Tensor:
    """The mean score of the block of the text that each token is in."""
    number = place // block
    blocks = int(number.max()) + 1
    counted = torch.where(here, score, 0.0)
    total = score.new_zeros(score.shape[0], blocks).scatter_add_(1, number, counted)
    count = score.new_zeros(score.shape[0], blocks).scatter_add_(1, number, here.to(score.dtype))
    return (total / count.clamp_min(1)).gather(1, number)

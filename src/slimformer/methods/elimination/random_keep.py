"""Compute a fixed fraction of the tokens, chosen by chance: what a choice costs, with no part that must be learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from slimformer.decisions.policy import Decision
from slimformer.errors import PlanError
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream


@dataclass(frozen=True)
class RandomKeep:
    """Sublayers that compute a seeded random choice of tokens; the others pass them by.

    The chance of a token depends on the seed, the sublayer and its position alone, so that a token meets the same
    sublayers whether it came in a prompt or was decoded, whatever else is in the batch.

    Attributes:
        keep: The fraction of tokens computed, above 0 and up to 1.
        layers: Which layers; None for all.
        kinds: Which sublayers.
        counts: `"ragged"`: every token by its own chance. `"equal"`: exactly `round(keep * tokens)` of every sequence,
            those with the best chances, for shapes that never change; a single token is always computed.
        keys: `"dense"`: tokens that an attention passes by supply keys and values all the same. `"compact"`: they do
            not; without a cache only.
        seed: Another seed, another choice.

    Raises:
        PlanError: If a field is not one of those allowed.

    Example:
        >>> RandomKeep(0.5, layers=[2, 3], kinds=["mlp"]).keep
        0.5
    """

    keep: float
    layers: Sequence[int] | None = None
    kinds: Sequence[Kind] = KINDS
    counts: Literal["ragged", "equal"] = "ragged"
    keys: Literal["dense", "compact"] = "dense"
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, (int, float)) or not 0 < self.keep <= 1:
            raise PlanError(f"RandomKeep(keep=...) takes a fraction above 0 and up to 1, got {self.keep!r}.")
        for name, allowed in (("counts", ("ragged", "equal")), ("keys", ("dense", "compact"))):
            if getattr(self, name) not in allowed:
                raise PlanError(
                    f"RandomKeep({name}=...) takes one of {', '.join(allowed)}, got {getattr(self, name)!r}."
                )
        object.__setattr__(self, "kinds", tuple(self.kinds))
        if not self.kinds or not set(self.kinds) <= set(KINDS):
            raise PlanError(f"RandomKeep(kinds=...) takes some of {', '.join(KINDS)}, got {self.kinds!r}.")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """A chance for every token of every named sublayer."""
        count = len(anatomy.layers)
        chosen = range(count) if self.layers is None else self.layers
        for index in chosen:
            if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
                raise PlanError(
                    f"RandomKeep names layer {index!r}, but {type(anatomy.stack).__name__} has {count} layers: "
                    f"allowed are 0 to {count - 1}."
                )
        compact = self.keys == "compact"
        sublayers = [(index, kind) for index in chosen for kind in self.kinds]
        numbers = tuple(2 * index + KINDS.index(kind) for index, kind in sublayers)
        return {
            (index, kind): Decision(
                rows=(_Chance(self, numbers, place),), compact_keys=compact and kind == "attention"
            )
            for place, (index, kind) in enumerate(sublayers)
        }


@dataclass(frozen=True)
class _Chance:
    """The row selector of one sublayer.

    Attributes:
        of: The method.
        sublayers: The numbers of all sublayers that the method names.
        place: Which of them this is.
    """

    of: RandomKeep
    sublayers: tuple[int, ...]
    place: int

    def __call__(self, stream: Stream, x: Tensor) -> Rows | None:
        """The rows of the residual `x` `[rows, hidden]` that the sublayer computes."""
        equal = self.of.counts == "equal"
        if self.of.keep == 1.0 or (equal and stream.tokens == 1):
            return None
        if equal and stream.held is not None:
            raise PlanError(
                "RandomKeep(counts='equal') chooses among the padded tokens of a batch, and padding has left the "
                "stream. Use counts='ragged'."
            )
        if torch.compiler.is_compiling():
            # In one graph nothing is gained by choosing for others too.
            number = self.sublayers[self.place] + 1_000_003 * self.of.seed
            (mask, index, each), place = self._choose(stream, number), 0
        else:
            choices = stream.derived(None)
            if self.of not in choices:
                seeds = _on_device(self.sublayers, 1_000_003 * self.of.seed, stream.device)
                choices[self.of] = self._choose(stream, seeds)
            (mask, index, each), place = choices[self.of], self.place
        return Rows(x.shape[0], None if index is None else index[place], mask[place], each)

    def _choose(self, stream: Stream, seeds: int | Tensor) -> tuple[Tensor, Tensor | None, int | None]:
        """For several sublayers at once: masks `[sublayers, rows]`, indices `[sublayers, kept]`, rows per sequence.

        One by one, a small model would wait longer for the choices than for what is computed.
        """
        chance = chances(stream.positions(), seeds).view(-1, stream.rows)
        if self.of.counts == "ragged":
            return chance < self.of.keep, None, None
        each = max(round(self.of.keep * stream.tokens), 1)
        by_sequence = chance.view(-1, stream.batch, stream.tokens)
        best = by_sequence.topk(each, dim=2, largest=False).indices.sort(2).values
        first = torch.arange(stream.batch, device=stream.device)[:, None] * stream.tokens
        index = (best + first).flatten(1)
        return torch.zeros_like(chance, dtype=torch.bool).scatter_(1, index, True), index, each


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[int, ...], plus: int, device: torch.device) -> Tensor:
    """Seeds `[sublayers, 1]`, copied once: a copy from the host could not be captured in a CUDA graph."""
    return (torch.tensor(numbers) + plus)[:, None].to(device)


def chances(positions: Tensor, seed: int | Tensor) -> Tensor:
    """A number from 0 to 1 for every position, the same on every device; seeds `[n, 1]` give `[n, positions]`.

    Example:
        >>> bool((chances(torch.arange(10000), 7) < 0.25).float().mean().sub(0.25).abs() < 0.02)
        True
    """
    # A multiplicative hash, mixed twice; within 31 bits, so that int64 never overflows.
    bits = (positions * 0x9E3779B1 + (seed % 0x7FFFFFFF) * 0x85EBCA6B + 0x165667B1) & 0x7FFFFFFF
    for factor in (0x2C1B3C6D, 0x297A2D39):
        bits = ((bits ^ (bits >> 15)) * factor) & 0x7FFFFFFF
    return (bits ^ (bits >> 13)).double() / 0x80000000

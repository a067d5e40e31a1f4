"""What a panel says of one model: the part kept of every capability, their mean, and the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from slimformer.errors import CalibrationError
from slimformer.evaluation.panel.capability import Kept

# Two figures this many standard errors apart differ; nearer ones are called equal.
_APART = 2.0


@dataclass(frozen=True)
class Judgement:
    """The capabilities of one model beside the dense one's.

    Attributes:
        capabilities: What was measured.
        left_out: Capabilities that were not, with the reason: the dense model has not got them, or no room.
        record: What reproduces it: budget, seed, sources, digests.
    """

    capabilities: Sequence[Kept]
    left_out: Mapping[str, str] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """The mean part kept."""
        return sum(of.kept for of in self.capabilities) / len(self.capabilities)

    @property
    def worst(self) -> Kept:
        """The capability of which least is kept."""
        return min(self.capabilities, key=lambda of: of.kept)

    @property
    def score(self) -> float:
        """Half the mean and half the worst; exactly 1 for the dense model."""
        return (self.mean + self.worst.kept) / 2

    @property
    def spread(self) -> float:
        """Standard error of the score."""
        replicates = self.replicates()
        if len(replicates):
            return float(replicates.std())
        # Of a stored judgement, the worst counts in its own right and as a part of the mean.
        count = len(self.capabilities)
        shares = [(1 / count + (of is self.worst)) / 2 for of in self.capabilities]
        parts = zip(shares, self.capabilities, strict=True)
        return math.sqrt(sum((share * of.spread) ** 2 for share, of in parts))

    def replicates(self) -> Tensor:
        """The score on every resample; empty if it was read from a file."""
        parts = [of.replicates for of in self.capabilities]
        if not parts or any(len(part) == 0 for part in parts):
            return torch.zeros(0, dtype=torch.float64)
        values = torch.stack(parts)
        return (values.mean(0) + values.amin(0)) / 2

    def capability(self, name: str) -> Kept:
        """One of them by name.

        Raises:
            CalibrationError: If it was not measured.
        """
        for of in self.capabilities:
            if of.name == name:
                return of
        why = self.left_out.get(name)
        raise CalibrationError(
            f"The capability {name!r} was not measured{f': {why}' if why else ''}. Measured were "
            f"{', '.join(of.name for of in self.capabilities)}."
        )

    def to_dict(self) -> dict[str, Any]:
        """What a plan's `measured` holds under `panel`."""
        return {
            "score": self.score,
            "spread": self.spread,
            "mean": self.mean,
            "worst": self.worst.name,
            "capabilities": {of.name: of.to_dict() for of in self.capabilities},
            **({"left_out": dict(self.left_out)} if self.left_out else {}),
            **self.record,
        }


def equal(first: Judgement, second: Judgement) -> bool:
    """Whether two plans are no further apart than the panel can tell.

    Their scores differ by at most two standard errors of the difference. Judgements of one panel are compared row by
    row (what makes a row easy makes it easy for both); others by their spreads.

    Raises:
        CalibrationError: If they are of different capabilities.

    Example:
        >>> one, other = (Judgement([Kept("text", kept, 0.02, 8)]) for kept in (0.91, 0.93))
        >>> equal(one, other)
        True
    """
    names = [[of.name for of in judgement.capabilities] for judgement in (first, second)]
    if names[0] != names[1]:
        raise CalibrationError(
            f"One judgement is of {', '.join(names[0])} and the other of {', '.join(names[1])}. Compare what one panel "
            "said of both."
        )
    rows = [judgement.replicates() for judgement in (first, second)]
    same = first.record.get("rows") is not None and first.record.get("rows") == second.record.get("rows")
    if same and len(rows[0]) and len(rows[0]) == len(rows[1]):
        apart = float((rows[0] - rows[1]).std())
    else:
        apart = math.hypot(first.spread, second.spread)
    return abs(first.score - second.score) <= _APART * apart

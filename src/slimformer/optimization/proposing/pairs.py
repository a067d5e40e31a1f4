"""What judged proposals teach about the next: pairs that cost more than their sum, and how losses grow together."""

from __future__ import annotations

import bisect
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

# Of the mean square of what is explained, towards pairs that cost nothing more.
_RIDGE = 0.1
# So many pairs are told to the programme, those that matter most.
_MOST = 400
_LEAST = 1e-6
# Logarithms that are nearer to each other than this, squared, tell no exponent.
_SPREAD = 0.05


@dataclass(frozen=True)
class Curve:
    """A figure that grows with another, through what was seen of both, along straight lines of their logarithms.

    Outside of what was seen it grows in proportion.

    Attributes:
        seen: Pairs of both figures, sorted.

    Example:
        >>> curve = Curve.through([(0.1, 0.2), (0.4, 0.8)])
        >>> round(curve(0.2), 4), round(curve(1.0), 4), Curve.through([])(0.3)
        (0.4, 2.0, 0.3)
    """

    seen: tuple[tuple[float, float], ...]

    @classmethod
    def through(cls, seen: Sequence[tuple[float, float]]) -> Curve:
        """Through the points, after a figure that is smaller than one before it was drawn up to that."""
        points: list[tuple[float, float]] = []
        for x, y in sorted((max(x, _LEAST), max(y, _LEAST)) for x, y in seen):
            if points and x <= points[-1][0] * (1 + 1e-9):
                points[-1] = (points[-1][0], math.sqrt(points[-1][1] * y))
            else:
                points.append((x, y))
        for place in range(1, len(points)):
            points[place] = (points[place][0], max(points[place][1], points[place - 1][1] * (1 + 1e-9)))
        return cls(tuple(points))

    def __call__(self, value: float) -> float:
        """The second figure where the first is this."""
        return self._read(value, 0)

    def inverse(self, value: float) -> float:
        """The first figure where the second is this."""
        return self._read(value, 1)

    def _read(self, value: float, given: int) -> float:
        value = max(value, _LEAST)
        if not self.seen:
            return value
        known, other = [of[given] for of in self.seen], [of[1 - given] for of in self.seen]
        place = bisect.bisect_left(known, value)
        if place in (0, len(known)):
            nearest = min(place, len(known) - 1)
            return value * other[nearest] / known[nearest]
        part = (math.log(value) - math.log(known[place - 1])) / (
            math.log(known[place]) - math.log(known[place - 1])
        )
        return math.exp((1 - part) * math.log(other[place - 1]) + part * math.log(other[place]))


def learnt_pairs(
    judged: Sequence[tuple[Collection[int], Tensor]], known: Collection[tuple[int, int]]
) -> dict[tuple[int, int], Tensor]:
    """What pairs cost beyond their sum, by least squares with a ridge over all that was judged.

    Args:
        judged: Of every proposal its units, and what it cost beyond what was predicted `[sources]`.
        known: Pairs that were measured by themselves.

    Example:
        >>> found = learnt_pairs([({0, 1}, torch.tensor([0.5])), ({0, 2}, torch.tensor([0.0]))], [])
        >>> {pair: round(float(more), 1) for pair, more in found.items()}
        {(0, 1): 0.5}
    """
    taken = set(known)
    columns = sorted({pair for units, _ in judged for pair in combinations(sorted(units), 2)} - taken)
    if not columns:
        return {}
    place = {pair: index for index, pair in enumerate(columns)}
    holds = torch.zeros(len(judged), len(columns), dtype=torch.float64)
    for row, (units, _) in enumerate(judged):
        own = [place[pair] for pair in combinations(sorted(units), 2) if pair not in taken]
        holds[row, own] = 1.0
    excess = torch.stack([more.double() for _, more in judged])
    gram = holds @ holds.T
    # As many unknowns as pairs, and few proposals: solved by the proposals.
    gram.diagonal().add_(_RIDGE * float(gram.diagonal().mean()) / max(len(judged), 1))
    found = holds.T @ torch.linalg.solve(gram, excess)
    order = found.abs().amax(1).argsort(descending=True, stable=True)[:_MOST].tolist()
    return {
        columns[index]: found[index] for index in sorted(order) if float(found[index].abs().amax()) > _LEAST
    }


def beyond(sums: Sequence[Tensor], lost: Sequence[Tensor]) -> list[Tensor]:
    """By how much each proposal differs from its prediction, once losses that grow unlike sums are allowed for.

    Args:
        sums: Of each proposal the sum over its units `[sources]`.
        lost: What it lost `[sources]`.

    Returns:
        Of each the sum that usually loses so much, less the sum that it is `[sources]`.
    """
    usual = growth(sums, lost)
    return [
        torch.tensor([_inverse(usual, float(value)) for value in of], dtype=torch.float64) - own.double()
        for own, of in zip(sums, lost, strict=True)
    ]


def growth(sums: Sequence[Tensor], lost: Sequence[Tensor]) -> tuple[float, float]:
    """Factor and exponent with which losses grow over sums of single losses; the exponent is 1 before it is known.

    Example:
        >>> factor, exponent = growth([torch.tensor([0.1]), torch.tensor([0.4])], [torch.tensor([0.2])] * 2)
        >>> growth([torch.tensor([0.1])], [torch.tensor([0.2])])[1], exponent
        (1.0, 0.5)
    """
    points = [
        (math.log(max(float(x), _LEAST)), math.log(max(float(y), _LEAST)))
        for own, of in zip(sums, lost, strict=True)
        for x, y in zip(own, of, strict=True)
    ]
    if not points:
        return 1.0, 1.0
    mean_x, mean_y = (sum(of) / len(points) for of in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points) / len(points)
    slope = 1.0
    if len(sums) > 1 and spread > _SPREAD:
        slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread / len(points)
    slope = min(max(slope, 0.5), 2.0)
    return math.exp(mean_y - slope * mean_x), slope


def grown(usual: tuple[float, float], total: float) -> float:
    """What a sum of single losses usually loses."""
    return usual[0] * max(total, _LEAST) ** usual[1]


def _inverse(usual: tuple[float, float], lost: float) -> float:
    return (max(lost, _LEAST) / usual[0]) ** (1 / usual[1])

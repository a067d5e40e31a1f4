"""The least loss that saves enough, as a mixed integer programme (as Puzzletron chooses blocks, arXiv 2411.19146)."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slimformer.errors import SlimformerError

# Seconds that one programme may take; what it has found by then is taken.
_LONGEST = 5.0
_GAP = 1e-4


@dataclass(frozen=True)
class Problem:
    """What may be left out.

    Attributes:
        saved: What each unit saves `[units]`.
        losses: What each costs, of every source, nats or the like `[sources, units]`.
        shares: How much each source counts in the mean `[sources]`, 1 in all.
        pairs: What two units cost beyond their sum, of every source `[sources]`.
        before: What is lost before any is left out `[sources]`.
        excluded: Choices that are not to be given again.
    """

    saved: Tensor
    losses: Tensor
    shares: Tensor
    pairs: Mapping[tuple[int, int], Tensor]
    before: Tensor
    excluded: Collection[frozenset[int]] = ()

    def loss(self, chosen: Collection[int]) -> float:
        """What is minimised: half of the mean over the sources, by their shares, and half of the worst."""
        found = self.each(chosen)
        return float(self.shares @ found + found.max()) / 2

    def each(self, chosen: Collection[int]) -> Tensor:
        """What is lost of every source `[sources]`."""
        found = self.before + self.losses[:, sorted(chosen)].sum(1)
        for (first, second), more in self.pairs.items():
            if first in chosen and second in chosen:
                found = found + more
        return found


def check_solver() -> None:
    """Refuse to begin where SciPy is not installed.

    Raises:
        SlimformerError: If it is not.
    """
    _scipy()


def solve(problem: Problem, least: float) -> frozenset[int] | None:
    """The choice that loses least of those that save at least so much; None where none does.

    Example:
        >>> two = Problem(torch.tensor([1.0, 2.0]), torch.tensor([[0.1, 0.3]]), torch.ones(1), {}, torch.zeros(1))
        >>> sorted(solve(two, 1.5)), solve(two, 4.0)
        ([1], None)
    """
    optimize, numpy = _scipy()
    units, sources, pairs = len(problem.saved), len(problem.losses), list(problem.pairs)
    if float(problem.saved.clamp_min(0).sum()) < least:
        return None
    # Whether each unit goes, whether both of each pair do, and the loss of the worst source.
    size = units + len(pairs) + 1
    more = torch.stack([problem.pairs[pair] for pair in pairs], 1) if pairs else torch.zeros(sources, 0)
    of_sources = torch.cat([problem.losses.double(), more.double(), torch.zeros(sources, 1)], 1)
    aim = (problem.shares.double() @ of_sources) / 2
    aim[-1] += 0.5
    rows, lower, upper = [], [], []

    def constrain(entries: Mapping[int, float], low: float, high: float) -> None:
        row = numpy.zeros(size)
        for place, value in entries.items():
            row[place] = value
        rows.append(row)
        lower.append(low)
        upper.append(high)

    constrain(dict(enumerate(problem.saved.tolist())), least, numpy.inf)
    for source in range(sources):
        row = -of_sources[source]
        row[-1] = 1.0
        constrain(dict(enumerate(row.tolist())), float(problem.before[source]), numpy.inf)
    for place, (first, second) in enumerate(pairs, start=units):
        constrain({first: 1.0, second: 1.0, place: -1.0}, -numpy.inf, 1.0)
        constrain({first: 1.0, place: -1.0}, 0.0, numpy.inf)
        constrain({second: 1.0, place: -1.0}, 0.0, numpy.inf)
    for choice in problem.excluded:
        constrain(
            {unit: 1.0 if unit in choice else -1.0 for unit in range(units)}, -numpy.inf, len(choice) - 1.0
        )
    low = numpy.zeros(size)
    high = numpy.ones(size)
    low[-1], high[-1] = -numpy.inf, numpy.inf
    found = optimize.milp(
        aim.numpy(),
        constraints=optimize.LinearConstraint(numpy.stack(rows), lower, upper),
        integrality=numpy.array([1] * units + [0] * (len(pairs) + 1)),
        bounds=optimize.Bounds(low, high),
        options={"time_limit": _LONGEST, "mip_rel_gap": _GAP},
    )
    if found.x is None:
        return None
    return frozenset(unit for unit in range(units) if found.x[unit] > 0.5)


def _scipy() -> tuple[Any, Any]:
    try:
        return importlib.import_module("scipy.optimize"), importlib.import_module("numpy")
    except ImportError as error:
        raise SlimformerError(
            'optimize needs SciPy, which is not installed: pip install "slimformer[optimize]"'
        ) from error


def units_in(choice: Collection[int], of: Sequence[Any]) -> tuple[Any, ...]:
    """What a choice stands for, in order."""
    return tuple(of[index] for index in sorted(choice))

"""A capability of the dense model, and the part of it that another model keeps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

RESAMPLES = 1000


@dataclass(frozen=True)
class Kept:
    """The part of one capability that is kept.

    Attributes:
        name: The capability.
        kept: Between 0 (nothing that the dense model can do) and 1 (all of it; exactly 1 for the dense model itself).
        spread: Standard error of `kept`, by bootstrap over rows.
        rows: How many rows it was measured on.
        parts: The same figure for each kind of row, where there are several.
        figures: What it was computed from, such as nats per token.
        replicates: What `kept` is on every resample, not cut to [0, 1] `[resamples]`; empty if read from a file.
    """

    name: str
    kept: float
    spread: float
    rows: int
    parts: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    replicates: Tensor = field(default_factory=lambda: torch.zeros(0), compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """What a plan's `measured` holds of it."""
        return {
            "kept": self.kept,
            "spread": self.spread,
            "rows": self.rows,
            **({"parts": dict(self.parts)} if self.parts else {}),
            **({"figures": dict(self.figures)} if self.figures else {}),
        }


class Capability(Protocol):
    """Rows that the dense model has been run on, by which other models are judged."""

    @property
    def name(self) -> str:
        """What is shown in tables."""
        ...

    def judged(self, model: Any) -> Kept:
        """Run a model, patched as it is, over the same rows."""
        ...

    def digest_parts(self) -> Sequence[object]:
        """What must be equal for two judgements to be of the same rows."""
        ...


def bootstrapped(
    name: str,
    groups: Sequence[str],
    estimate: Callable[[Tensor], Tensor],
    figures: Mapping[str, float],
    *,
    pooled: bool,
    seed: int,
) -> Kept:
    """The part that is kept, from per-row figures, and how far it would be elsewhere with other rows.

    Args:
        name: The capability.
        groups: The kind of each row. Resamples hold as many rows of each kind as there are.
        estimate: From how often each row counts, float64 `[resamples, rows]`, to the part kept `[resamples]`.
        figures: Passed on.
        pooled: Whether all rows count together; else the mean over kinds is taken, each of them counting the same.
        seed: Of the resamples: of the same seed and rows they are the same, so that two models can be compared on each.

    Example:
        >>> nats = torch.tensor([0.0, 0.2, 0.1, 0.1], dtype=torch.float64)
        >>> kept = bootstrapped("text", ["prose", "prose", "code", "code"],
        ...                     lambda times: (-(times @ nats) / times.sum(1)).exp(), {}, pooled=True, seed=0)
        >>> round(kept.kept, 4), kept.spread > 0, sorted(kept.parts)
        (0.9048, True, ['code', 'prose'])
    """
    kinds = list(dict.fromkeys(groups))
    places = {kind: torch.tensor([i for i, of in enumerate(groups) if of == kind]) for kind in kinds}
    times = torch.zeros(RESAMPLES + 1, len(groups), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    for place in places.values():
        drawn = torch.randint(len(place), (RESAMPLES, len(place)), generator=generator)
        times[1:, place] = torch.zeros(RESAMPLES, len(place), dtype=torch.float64).scatter_add_(
            1, drawn, torch.ones(drawn.shape, dtype=torch.float64)
        )
    # What was measured is the first row: each row once.
    times[0] = 1.0
    alone = {}
    for kind, place in places.items():
        only = torch.zeros_like(times)
        only[:, place] = times[:, place]
        alone[kind] = estimate(only)
    values = estimate(times) if pooled else torch.stack(list(alone.values())).mean(0)
    # Cut once, at the end: rounding of a mean of ones must not show, and a part kept is a part.
    parts = {kind: _part(of[0]) for kind, of in alone.items()} if len(kinds) > 1 else {}
    return Kept(name, _part(values[0]), float(values[1:].std()), len(groups), parts, figures, values[1:])


def _part(value: Tensor) -> float:
    return min(max(float(value), 0.0), 1.0)

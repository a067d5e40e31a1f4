"""Quality over the depth and the width of an embedding, and the points that nothing smaller reaches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Grid:
    """Quality over depth and width.

    Attributes:
        name: What was measured; the higher, the better.
        layers: How many layers run, ascending; the last is the dense model's number.
        dimensions: Of the embedding, descending; the first is the whole.
        scores: One row per entry of `layers`, one value per entry of `dimensions`.
    """

    name: str
    layers: tuple[int, ...]
    dimensions: tuple[int, ...]
    scores: tuple[tuple[float, ...], ...]

    @property
    def dense(self) -> float:
        """The figure of the dense model at full width."""
        return self.scores[-1][0]

    def front(self) -> list[tuple[int, int]]:
        """Layers and dimensions that nothing smaller reaches: the Pareto front.

        Example:
            >>> Grid("score", (1, 2), (8, 4), ((0.5, 0.6), (0.9, 0.6))).front()
            [(1, 4), (2, 8)]
        """
        points = [
            (layer, dimension, score)
            for layer, row in zip(self.layers, self.scores, strict=True)
            for dimension, score in zip(self.dimensions, row, strict=True)
        ]
        return [
            (layer, dimension)
            for layer, dimension, score in points
            if not any(
                (other, width) != (layer, dimension)
                and other <= layer
                and width <= dimension
                and value >= score
                for other, width, value in points
            )
        ]

    def to_dict(self) -> dict[str, Any]:
        """As a plan's provenance holds it."""
        return {
            "name": self.name,
            "layers": list(self.layers),
            "dimensions": list(self.dimensions),
            "scores": [list(row) for row in self.scores],
            "front": [list(point) for point in self.front()],
        }

    @classmethod
    def from_dict(cls, value: Any) -> Grid | None:
        """The grid of a plan; None where there is none, or it has another shape: a plan may come from anywhere."""
        try:
            layers, dimensions = ([int(n) for n in value[key]] for key in ("layers", "dimensions"))
            scores = tuple(tuple(float(score) for score in row) for row in value["scores"])
        except (KeyError, TypeError, ValueError):
            return None
        whole = layers and dimensions and len(scores) == len(layers)
        if not whole or any(
            len(row) != len(dimensions) or not all(map(math.isfinite, row)) for row in scores
        ):
            return None
        return cls(str(value.get("name", "")), tuple(layers), tuple(dimensions), scores)

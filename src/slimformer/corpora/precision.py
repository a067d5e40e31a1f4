"""In which numbers vectors are kept: float32, float16, or int8 with the same ranges for a whole corpus."""

from __future__ import annotations

from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from slimformer.corpora.embedder import Vectors


class Precision(str, Enum):
    """What a number of a kept vector is."""

    float32 = "float32"
    float16 = "float16"
    int8 = "int8"


def ranges_of(parts: list[Vectors]) -> Vectors:
    """The least and the largest value of each number, `[2, dimension]`, as sentence-transformers quantises by them."""
    return np.stack([np.min([p[0] for p in parts], axis=0), np.max([p[1] for p in parts], axis=0)])


def kept(
    vectors: Vectors, precision: Precision, ranges: Vectors | None
) -> tuple[npt.NDArray[Any], dict[int, str]]:
    """Vectors as they are kept, and those that this cannot be done with, by place.

    int8 is `sentence_transformers.util.quantize_embeddings`. What lies outside of the ranges is put on their ends, as
    its versions before 6 do not.

    Args:
        vectors: In float32, `[texts, dimension]`.
        precision: What to keep.
        ranges: For int8: the least and the largest value of each number, `[2, dimension]`.
    """
    if precision is Precision.float16:
        with np.errstate(over="ignore"):
            half = vectors.astype(np.float16)
        broken = np.flatnonzero(~np.isfinite(half).all(axis=1))
        return half, {int(place): "has a number that float16 cannot hold" for place in broken}
    if precision is Precision.int8 and ranges is not None:
        if not len(vectors):
            return vectors.astype(np.int8), {}
        # Slow to import, and of no use for the other two.
        from sentence_transformers.util import quantize_embeddings  # noqa: PLC0415

        inside = np.clip(vectors, ranges[0], ranges[1])
        return quantize_embeddings(inside, precision="int8", ranges=ranges), {}
    return vectors, {}

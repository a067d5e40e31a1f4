"""How fast texts become embeddings where they come in batches, as on a server, with the plain patch and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slimformer.errors import DataError
from slimformer.patching import patched


@dataclass(frozen=True)
class Arrivals:
    """What was measured.

    Attributes:
        texts: How many.
        batch_size: Texts per call; within a call sentence-transformers sorts them by length.
        dense_per_second: Texts per second without the patch.
        patched_per_second: Texts per second with it.
        lowest_cosine: Between the two embeddings of a text; 1 is equal.
    """

    texts: int
    batch_size: int
    dense_per_second: float
    patched_per_second: float
    lowest_cosine: float

    @property
    def speedup(self) -> float:
        """How many times as fast the patched model is."""
        return self.patched_per_second / self.dense_per_second


def measure_arrivals(
    embedder: Any, texts: Sequence[str], *, batch_size: int = 32, repeats: int = 2
) -> Arrivals:
    """Encode batches in the order in which they come, unpatched and patched in turns.

    Args:
        embedder: An unpatched `SentenceTransformer`; it is left as it was.
        texts: In the order of their arrival.
        batch_size: Texts per call.
        repeats: Times per median, after one round that does not count.

    Raises:
        DataError: If there is no text, or a size is below 1.
    """
    if not texts or batch_size < 1 or repeats < 1:
        raise DataError(
            f"Texts, batch_size and repeats must each be at least 1, got {len(texts)}, {batch_size} and {repeats}."
        )
    batches = [list(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    dense, slim = [], []
    before = after = torch.zeros(0)
    for _ in range(repeats + 1):
        seconds, before = _encode(embedder, batches)
        dense.append(seconds)
        with patched(embedder):
            seconds, after = _encode(embedder, batches)
        slim.append(seconds)
    return Arrivals(
        len(texts),
        batch_size,
        len(texts) / statistics.median(dense[1:]),
        len(texts) / statistics.median(slim[1:]),
        float(F.cosine_similarity(before, after).min()),
    )


def _encode(embedder: Any, batches: Sequence[list[str]]) -> tuple[float, Tensor]:
    """Seconds, and the embeddings of all texts `[texts, dimensions]`, on the CPU."""
    start = time.perf_counter()
    found = [
        embedder.encode(batch, batch_size=len(batch), show_progress_bar=False, convert_to_tensor=True).cpu()
        for batch in batches
    ]
    return time.perf_counter() - start, torch.cat(found).float()

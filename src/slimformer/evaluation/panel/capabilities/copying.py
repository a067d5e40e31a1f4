"""The capability `copying`: a random sequence comes a second time, at once or thousands of tokens later."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slimformer.evaluation.panel.capabilities.reading import Row

AT_ONCE = "at once"
# Tokens of the second run that are read before it counts.
_CUE = 4
# The model's own probability of a repeated token below which it is not said to copy.
LEAST = 0.1


def copying_rows(
    drawable: Sequence[int],
    front: Sequence[int],
    filler: Sequence[int],
    *,
    count: int,
    tokens: int,
    gaps: Sequence[int],
    far: int,
    longest: int,
    seed: int,
) -> tuple[list[Row], float]:
    """Sequences of tokens drawn at random, each followed by itself; later ones after some text.

    Args:
        drawable: What is drawn from: tokens that occur in text, since the rarest of a vocabulary are hardly known to
            the model.
        front: What the tokenizer puts before a text.
        filler: Tokens of text for the gaps, repeated as needed.
        count: Sequences that are repeated at once.
        tokens: Tokens of each.
        gaps: Tokens between the runs of further sequences; those that the model has no room for are left out.
        far: Sequences for each gap.
        longest: Most tokens that the model reads.
        seed: Which tokens are drawn.

    Returns:
        The rows, and the chance of guessing a token.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = min(tokens, (longest - len(front)) // 2)
    rows = []
    for gap in (0, *(gap for gap in gaps if len(front) + 2 * tokens + gap <= longest)):
        between = [filler[index % len(filler)] for index in range(gap)]
        for _ in range(far if gap else count):
            drawn = torch.randint(len(drawable), (tokens,), generator=generator)
            run = [drawable[index] for index in drawn.tolist()]
            kind = f"{gap} tokens later" if gap else AT_ONCE
            rows.append(Row([*front, *run, *between, *run[:_CUE]], run[_CUE:], kind))
    return rows, 1 / len(drawable)

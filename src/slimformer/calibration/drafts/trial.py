"""How long a draft makes tokens take, from what it would have guessed: `generate` replayed on paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimformer.methods.speculation.pace import LONGEST, Ratio, group_of, prior


@dataclass(frozen=True)
class Guesses:
    """What a draft guesses for every token of a text that the model wrote, given the tokens before.

    Attributes:
        right: Whether it guesses the token.
        confidence: How sure it is of its guess.
    """

    right: Sequence[bool]
    confidence: Sequence[float]


@dataclass(frozen=True)
class Trial:
    """What came of a draft on paper.

    Attributes:
        time: Of a token, in steps of the whole model; below 1 the draft pays.
        accepted: The part of its tokens that is accepted.
        drafted: Tokens that it drafts for every one that is generated.
    """

    time: float
    accepted: float
    drafted: float


def trial(guesses: Sequence[Guesses], cost: float, checking: float) -> Trial:
    """Generate on paper, with drafts that go on as long as that pays.

    Args:
        guesses: Of the draft, text by text.
        cost: A step of the draft, as a part of a step of the model.
        checking: What checking one more token costs, likewise.

    Returns:
        What came of it.

    Example:
        >>> sure = Guesses([True] * 60, [0.99] * 60)
        >>> trial([sure], cost=0.5, checking=0.0).time < 0.6
        True
        >>> trial([Guesses([False] * 60, [0.1] * 60)], cost=0.5, checking=0.0).time
        1.5
    """
    right_of = _acceptance(guesses)
    expected = sum(r.hits for r in right_of) / sum(r.of for r in right_of)
    time, tokens, drafted, accepted = 0.0, 0, 0, 0
    for text in guesses:
        place = 0
        while place < len(text.right):
            chance, length, hits = 1.0, 0, 0
            while length < LONGEST and place + length < len(text.right):
                # Behind a wrong guess the draft goes on as if it were right.
                hits += int(hits == length and text.right[place + length])
                chance *= right_of[group_of(text.confidence[place + length])].value
                length += 1
                if chance * expected <= cost + checking:
                    break
            time += 1.0 + length * (cost + checking)
            drafted, accepted = drafted + length, accepted + hits
            step = min(hits + 1, len(text.right) - place)
            place, tokens = place + step, tokens + step
    return Trial(time / max(tokens, 1), accepted / max(drafted, 1), drafted / max(tokens, 1))


def _acceptance(guesses: Sequence[Guesses]) -> list[Ratio]:
    """How often guesses were right, by how sure the draft was."""
    found = prior()
    for text in guesses:
        for right, confidence in zip(text.right, text.confidence, strict=True):
            ratio = found[group_of(confidence)]
            ratio.hits, ratio.of = ratio.hits + right, ratio.of + 1
    return found

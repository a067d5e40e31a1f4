"""Whether calls of `generate` that ask a draft are faster than calls that do not: by what a token takes in them."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from slimformer.methods.speculation.pace import Typical

# Fewer tokens than these say little about what one takes.
_LEAST_TOKENS = 8
# Most calls that are left without drafts before one shows again what they are worth.
_LONGEST = 64


@dataclass
class Worth:
    """Calls with drafts beside calls without, since assisted generation costs time also where nothing is drafted.

    Attributes:
        without: Seconds of a token in calls without drafts.
        left: How many more calls are without.

    Example:
        >>> worth = Worth()
        >>> worth.count(tokens=20, seconds=0.3, rested=True)
        >>> worth.sits_out(), worth.sits_out()
        (True, False)
    """

    without: Typical = field(default_factory=Typical)
    left: int = 0
    _last: int = 0

    def sits_out(self) -> bool:
        """Whether this call is to be without drafts."""
        if self.left == 0:
            return False
        self.left -= 1
        return True

    def count(self, tokens: int, seconds: float, rested: bool) -> None:
        """A call with drafts.

        Args:
            tokens: How many it wrote behind the first.
            seconds: In which time.
            rested: Whether drafts have stopped since they did not pay beside the other steps of such calls.
        """
        if tokens < _LEAST_TOKENS:
            return
        known = self.without.value
        if (known is None and rested) or (known is not None and seconds / tokens > known):
            self.left = self._last = min(max(2 * self._last, 1), _LONGEST)
        else:
            self._last = 0

    def count_without(self, clock: Clock) -> None:
        """A call without drafts."""
        if clock.tokens >= _LEAST_TOKENS:
            self.without.add(clock.seconds / clock.tokens)


class Clock(StoppingCriteria):
    """Stops nothing, and remembers when tokens came.

    Attributes:
        tokens: How many behind the first.
        seconds: From the first to the last.
    """

    def __init__(self) -> None:
        self.tokens, self.seconds, self._begun = -1, 0.0, 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """A token has come."""
        now = time.perf_counter()
        self.tokens += 1
        if self.tokens == 0:
            self._begun = now
        self.seconds = now - self._begun
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

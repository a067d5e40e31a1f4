"""The time that a training may take."""

from __future__ import annotations

import math
import time

from slimformer.errors import CalibrationError


class Minutes:
    """Runs from when it is made.

    Args:
        given: Minutes in all; None for no end.

    Raises:
        CalibrationError: If that is no number above 0.
    """

    def __init__(self, given: float | None) -> None:
        if given is not None and (isinstance(given, (bool, str)) or not (given > 0 and math.isfinite(given))):
            raise CalibrationError(f"minutes must be a number above 0, or None for no limit, got {given!r}.")
        self.begun = time.monotonic()
        self.seconds = math.inf if given is None else 60.0 * given
        self.kept_back = 0.0

    def part(self, share: float) -> float:
        """Seconds of a part of the whole."""
        return share * self.seconds

    def keep_back(self, seconds: float) -> None:
        """Leave so much at the end for what comes last."""
        self.kept_back += seconds

    def until(self, share: float) -> float:
        """When this part of what is left now is over, by `time.monotonic`."""
        now = time.monotonic()
        return now + share * max(self.begun + self.seconds - self.kept_back - now, 0.0)

    @property
    def used(self) -> float:
        """Minutes since the beginning."""
        return (time.monotonic() - self.begun) / 60.0

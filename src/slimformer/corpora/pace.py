"""How far a run is, how fast it goes, and how long it will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

# Seconds over which speed is taken: long enough for shards that are finished by turns.
_WINDOW = 120.0


@dataclass
class Pace:
    """Counts texts as they are done.

    Attributes:
        total: All that there are.
        done: Those that are done, also before this run went on.
        clock: Tells the time in seconds.

    Example:
        >>> times = iter([30.0, 40.0])
        >>> pace = Pace(1000, 400, lambda: next(times))
        >>> pace.count(100, seconds=10); pace.count(100, seconds=10)
        >>> pace.per_second, pace.seconds_left, str(pace)
        (10.0, 40.0, '600 of 1,000 texts, 10.0 texts/s, 40 s left')
    """

    total: int
    done: int
    clock: Callable[[], float] = time.monotonic
    _marks: deque[tuple[float, int]] = field(default_factory=deque)

    def count(self, texts: int, seconds: float) -> None:
        """So many more are done, and took so long; time is counted from when the first of them were begun."""
        now = self.clock()
        if not self._marks:
            self._marks.append((now - seconds, self.done))
        self.done += texts
        self._marks.append((now, self.done))
        while len(self._marks) > 2 and self._marks[-1][0] - self._marks[1][0] > _WINDOW:
            self._marks.popleft()

    @property
    def per_second(self) -> float | None:
        """Texts per second of late; None before any was done."""
        if not self._marks:
            return None
        (begin, before), (end, now) = self._marks[0], self._marks[-1]
        return (now - before) / (end - begin) if end > begin and now > before else None

    @property
    def seconds_left(self) -> float | None:
        """How long the others will take at that speed; None before any was done."""
        speed = self.per_second
        return None if speed is None else (self.total - self.done) / speed

    def __str__(self) -> str:
        said = f"{self.done:,} of {self.total:,} texts"
        speed, left = self.per_second, self.seconds_left
        if speed is None or left is None:
            return said
        return f"{said}, {speed:,.{0 if speed >= 100 else 1}f} texts/s, {_duration(left)} left"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

"""Progress bars of a calibration, one per stage, with the time left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")


class Stages:
    """Shows bars while its `with` block runs, or nothing.

    Args:
        shown: Whether to show them.
    """

    def __init__(self, shown: bool) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, disable=not shown)

    def __enter__(self) -> Stages:
        self.progress.start()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.progress.stop()

    def track(self, items: Sequence[Item], description: str) -> Iterator[Item]:
        """The items, with a bar that moves as they are taken."""
        tracked: Iterable[Item] = self.progress.track(items, description=description)
        yield from tracked

    def advance(self, description: str) -> Callable[[int], None]:
        """A function that moves a bar by one; it is told how many moves a round has, and rounds follow each other."""
        task = self.progress.add_task(description, total=None)

        def move(round_length: int) -> None:
            bar = self.progress.tasks[self.progress.task_ids.index(task)]
            if bar.total is None or bar.completed >= bar.total:
                self.progress.reset(task, total=round_length)
            self.progress.advance(task)

        return move

"""In which order a training reads its rows."""

from __future__ import annotations

import torch
from torch import Tensor

# Batches among whose texts those of like length are found.
_ALIKE = 50


class RowOrder:
    """Which rows each step reads: an order of all of them for every pass over the text, which the seed decides.

    Texts of their own, which come with their masks, are read beside others of about their length, so that little of a
    batch is padding.

    Args:
        rows: `[rows, tokens]`, or texts of their own `[rows, 2, tokens]`.
        each: Rows of a forward pass of one process.
        accumulate: Forward passes of a step.
        seed: Decides the order.
        processes: The number of this process, and how many there are.

    Example:
        >>> order = RowOrder(torch.zeros(5, 8), 2, 1, 0)
        >>> sorted(row for step in range(5) for row in order.of(step, 0).tolist())
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    """

    def __init__(
        self, rows: Tensor, each: int, accumulate: int, seed: int, processes: tuple[int, int] = (0, 1)
    ) -> None:
        self.count, self.each, self.accumulate, self.seed = len(rows), each, accumulate, seed
        self.process, self.processes = processes
        self.lengths = rows[:, 1].sum(1) if rows.dim() == 3 else None
        self.turn, self.places = -1, torch.empty(0, dtype=torch.long)

    def of(self, step: int, part: int) -> Tensor:
        """The numbers of the rows that one forward pass reads."""
        first = ((step * self.accumulate + part) * self.processes + self.process) * self.each
        return torch.tensor([self._row(number) for number in range(first, first + self.each)])

    def _row(self, number: int) -> int:
        turn, place = divmod(number, self.count)
        if turn != self.turn:
            self.turn, self.places = turn, self._turned(turn)
        return int(self.places[place])

    def _turned(self, turn: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + turn)
        order = torch.randperm(self.count, generator=generator)
        if self.lengths is None:
            return order
        batches: list[Tensor] = []
        at_once = self.each * self.processes
        for part in order.split(_ALIKE * at_once):
            found = list(part[self.lengths[part].argsort(descending=True)].split(at_once))
            batches += [found[place] for place in torch.randperm(len(found), generator=generator).tolist()]
        # One that is not full stands last, so that the others stay what steps read.
        return torch.cat(sorted(batches, key=len, reverse=True))

"""Every row is read once in a pass, by one process, and texts stand beside others of their length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slimformer.training.row_order import RowOrder


def texts(lengths: Tensor) -> Tensor:
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return torch.stack([mask, mask], 1)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("own", [False, True])
def test_a_pass_reads_every_row_once(own: bool, processes: int) -> None:
    rows = texts(torch.arange(1, 41)) if own else torch.zeros(40, 8)
    orders = [RowOrder(rows, 2, 2, 3, (process, processes)) for process in range(processes)]
    steps = 40 // (2 * 2 * processes)
    read = [order.of(step, part) for order in orders for step in range(steps) for part in range(2)]
    assert torch.cat(read).sort().values.tolist() == list(range(40))
    again = torch.cat(
        [order.of(step, part) for order in orders for step in range(steps) for part in range(2)]
    )
    assert torch.equal(again, torch.cat(read))


def test_texts_of_a_batch_are_of_like_length() -> None:
    lengths = torch.randint(1, 200, (256,), generator=torch.Generator().manual_seed(0))
    order = RowOrder(texts(lengths), 16, 1, 0)
    batches = [lengths[order.of(step, 0)] for step in range(16)]
    assert max(int(batch.max() - batch.min()) for batch in batches) < 40
    longest = [int(batch.max()) for batch in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_a_batch_that_is_not_full_is_read_last() -> None:
    lengths = torch.arange(1, 20)
    order = RowOrder(texts(lengths), 4, 1, 1)
    first = torch.cat([order.of(step, 0) for step in range(5)])[:19]
    assert first.sort().values.tolist() == list(range(19))
    assert all(int(order.of(step, 0).max() - order.of(step, 0).min()) == 3 for step in range(4))

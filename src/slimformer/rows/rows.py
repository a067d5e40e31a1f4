"""Which rows of the residual stream a sublayer computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(eq=False)
class Rows:
    """A choice of rows of a stream `[rows, hidden]`, as sorted indices or as a mask, each made from the other.

    A mask says nothing about how many rows it keeps until the device is asked; indices have a known number.

    Attributes:
        total: How many rows the stream has.
        given_index: `[kept]` int64, strictly ascending; None if only a mask was given.
        given_mask: bool `[total]`; None if only indices were given.
        each: How many rows every sequence keeps, where that is the same number for all.
        evict_caches: Whether the other rows, if they leave the stream, leave the caches of later layers too.
        mean_behind: Whether those come out of the model as the mean of the rows of their sequence that stayed.
        derived: What was computed from these rows for the layers that share them.

    Example:
        >>> import torch
        >>> Rows(4, given_mask=torch.tensor([True, False, True, True])).index
        tensor([0, 2, 3])
        >>> Rows(4, given_index=torch.tensor([1])).mask
        tensor([False,  True, False, False])
    """

    total: int
    given_index: Tensor | None = None
    given_mask: Tensor | None = None
    each: int | None = None
    evict_caches: bool = False
    mean_behind: bool = False
    derived: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def index(self) -> Tensor:
        """Sorted row indices; for a mask this waits for the device, once."""
        if self.given_index is None:
            self.given_index = self.mask.nonzero().squeeze(1)
        return self.given_index

    @property
    def mask(self) -> Tensor:
        """Whether each row is kept, bool `[total]`."""
        if self.given_mask is None:
            mask = torch.zeros(self.total, dtype=torch.bool, device=self.index.device)
            self.given_mask = mask.index_fill(0, self.index, True)
        return self.given_mask

    @property
    def known_count(self) -> int | None:
        """How many rows are kept, if that can be said without waiting for the device."""
        return None if self.given_index is None else self.given_index.shape[0]

    def __and__(self, other: Rows) -> Rows:
        """The rows that both keep."""
        if self is other:
            return self
        return Rows(self.total, given_mask=self.mask & other.mask)

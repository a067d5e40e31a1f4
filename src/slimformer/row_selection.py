"""What names the rows that a sublayer computes, and what several of those agree on."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from slimformer.errors import PlanError
from slimformer.rows import Rows
from slimformer.stream import Stream

# Names the rows a sublayer computes, given the stream and its residual `[rows, hidden]`; None for all of them.
RowSelector = Callable[[Stream, Tensor], Rows | None]


def intersection(selectors: tuple[RowSelector, ...], stream: Stream, x: Tensor) -> Rows | None:
    """The rows that every selector keeps, or None if all keep everything.

    Raises:
        PlanError: If a selector answers for another number of rows than the stream has.
    """
    chosen: Rows | None = None
    for selector in selectors:
        rows = selector(stream, x)
        if rows is None:
            continue
        if rows.total != x.shape[0]:
            raise PlanError(
                f"A row selector answered for {rows.total} rows, and the stream has {x.shape[0]}. It must choose "
                "among the rows of the stream that it is given."
            )
        chosen = rows if chosen is None else chosen & rows
    return chosen

"""What names the rows that a sublayer computes, and what several of those agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from slimformer.cache.slots import has_foreign_cache
from slimformer.errors import PlanError
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream

# Names the rows a sublayer computes, given the stream and its residual `[rows, hidden]`; None for all of them. One with
# a true attribute `by_token` decides about a token by that token alone, so that rows of the batch may hold any texts.
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


def compares_tokens(selectors: Iterable[RowSelector]) -> bool:
    """Whether one of them may decide about a token by others, so that a row of the batch must be one text."""
    return not all(getattr(select, "by_token", False) for select in selectors)


def check_one_text_per_row(selectors: Iterable[RowSelector], arguments: Mapping[str, Any]) -> None:
    """Refuse the arguments of a layer by which a row of the batch holds several texts or parts of them.

    Raises:
        PlanError: If a selector compares the tokens of a text.
    """
    packed = arguments.get("cu_seq_lens_q") is not None or has_foreign_cache(arguments)
    if packed and compares_tokens(selectors):
        raise PlanError(
            "A row of this batch holds several texts or parts of them (cu_seq_lens_q, continuous batching), and the "
            "plan chooses tokens among those of one text. Pad the batch and pass an attention mask: one text per row."
        )

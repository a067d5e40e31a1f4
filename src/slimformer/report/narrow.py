"""What a calibration of narrow MLPs measured: a table for a terminal, and the rows of the one on a plan's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from slimformer.plans.plan import Plan

_STAYS = "hidden units that stay"


def narrow_table(plan: Plan) -> Table | None:
    """Quality by the fraction of hidden units that stay; None if the plan carries none.

    Example:
        >>> from slimformer import LayerDrop
        >>> narrow = {"name": "nDCG@10", "dense": 0.4, "curve": [{"keep": 0.5, "score": 0.39}]}
        >>> narrow_table(Plan([LayerDrop(mlp=[0])], provenance={"narrow": narrow})).row_count
        2
    """
    rows = narrow_rows(plan)
    if not rows:
        return None
    table = Table(title=Text("Narrow MLPs"), title_justify="left")
    for name in rows[0]:
        table.add_column(Text(name), justify="right")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def narrow_rows(plan: Plan) -> list[tuple[str, str]]:
    """The names of both columns, then the fractions that stay and the quality with each; empty if none was measured."""
    found = plan.provenance.get("narrow")
    curve = found.get("curve") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(curve, Sequence):
        return []
    points = [point for point in curve if isinstance(point, Mapping)]
    measured = [(1.0, found.get("dense")), *((point.get("keep"), point.get("score")) for point in points)]
    rows = [
        ("dense" if keep == 1 else f"{keep:.0%}", f"{score:#.4g}")
        for keep, score in measured
        if isinstance(keep, (int, float)) and isinstance(score, (int, float))
    ]
    return [(_STAYS, str(found.get("name", ""))), *rows]

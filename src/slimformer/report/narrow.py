"""What a calibration of narrow MLPs measured, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from slimformer.plans.plan import Plan


def narrow_table(plan: Plan) -> Table | None:
    """Quality by the fraction of hidden units that stay; None if the plan carries none.

    Example:
        >>> from slimformer import LayerDrop
        >>> narrow = {"name": "nDCG@10", "dense": 0.4, "curve": [{"keep": 0.5, "score": 0.39}]}
        >>> narrow_table(Plan([LayerDrop(mlp=[0])], provenance={"narrow": narrow})).row_count
        2
    """
    found = plan.provenance.get("narrow")
    curve = found.get("curve") if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(curve, Sequence):
        return None
    points = [point for point in curve if isinstance(point, Mapping)]
    rows = [(1.0, found.get("dense")), *((point.get("keep"), point.get("score")) for point in points)]
    table = Table(title=Text("Narrow MLPs"), title_justify="left")
    table.add_column("hidden units that stay", justify="right")
    table.add_column(Text(str(found.get("name", ""))), justify="right")
    for keep, score in rows:
        if isinstance(keep, (int, float)) and isinstance(score, (int, float)):
            table.add_row("dense" if keep == 1 else f"{keep:.0%}", f"{score:#.4g}")
    return table

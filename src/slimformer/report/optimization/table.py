"""The candidates of an optimisation as a table for a terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from slimformer.plans.plan import Plan
from slimformer.report.optimization.points import asked, capabilities_of, found_in, notes_of, points_of


def optimize_table(plan: Plan, front: bool = False) -> Table:
    """Every candidate with its speed and what it keeps of each capability; without rows where there is none.

    Args:
        plan: A plan that `slimformer.optimize` made.
        front: Show only those that none is faster than at no more loss, and the chosen one.

    Example:
        >>> from slimformer import LayerDrop
        >>> tried = [{"what": "MLPs 3", "speedup": 1.1, "lost": {"text": 0.01}, "mean_lost": 0.01, "chosen": True}]
        >>> said = {"optimize": {"goal": "prefill", "max_loss": 0.02, "candidates": tried}}
        >>> optimize_table(Plan([LayerDrop(mlp=[3])], measured=said)).row_count
        1
    """
    found = found_in(plan)
    points = points_of(found)
    names = capabilities_of(points)
    table = Table(
        title=Text(f"Optimized for {asked(found)}" if found else "Optimized"),
        title_justify="left",
        caption=Text(". ".join(note.rstrip(".") for note in notes_of(found))),
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("leaves out")
    table.add_column("smaller" if found.get("goal") == "memory" else "faster", justify="right")
    for name in ("kept", *names):
        table.add_column(Text(name), justify="right")
    for point in points:
        if front and not (point.front or point.chosen):
            continue
        mark = "chosen" if point.chosen else "front" if point.front else ""
        kept = [
            f"{100 * (1 - value):.1f}%" for value in (point.mean, *(point.lost.get(n, 0.0) for n in names))
        ]
        words = point.what + ", repaired" * point.repaired
        table.add_row(mark, Text(words), f"{point.speedup:.2f}×", *kept, style="bold" if point.chosen else "")
    return table

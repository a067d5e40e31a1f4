"""What is written and printed of an optimisation: the page, the curve, the table, and what to do with the plan."""

from __future__ import annotations

from pathlib import Path

from slimformer.cli.output import note, print_tables, write_text
from slimformer.plans.plan import Plan
from slimformer.report import optimize_curve, optimize_table, plan_page, uses_of
from slimformer.report.optimization.points import chosen_words, found_in

_PAGE = "plan.html"


def show_optimized(plan: Plan, folder: Path, front: bool = False) -> None:
    """Write the plan's page beside it, and print the curve and every candidate.

    Args:
        plan: The plan.
        folder: Where it is.
        front: Print only the candidates of which none is faster at no more loss.
    """
    page = folder / _PAGE
    write_text(page, plan_page(plan))
    curve = optimize_curve(plan)
    if curve:
        print_tables(curve, "")
    print_tables(optimize_table(plan, front))
    chosen = chosen_words(found_in(plan))
    if chosen:
        note(f"Chosen: {chosen}.")
    note(f"The plan is in {folder}, its page with the curve and all that was tried in {page}.")


def print_uses(plan: Plan, model: str, folder: Path) -> None:
    """How to use the plan, serve it and undo it, one line each, to standard error."""
    uses = uses_of(plan, model, str(folder))
    width = max(len(use.name) for use in uses) + 1
    for use in uses:
        note(f"  {use.name + ':':<{width}}  {use.how}")

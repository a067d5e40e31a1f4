"""A plan and its measurements as tables for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from slimformer.decisions.registry import settings_of
from slimformer.methods.layer_drop import LayerDrop
from slimformer.plans.plan import Plan, PlannedMethod
from slimformer.report.summary import Summary, comparison, figure


def plan_table(plan: Plan) -> Table:
    """The dropped sublayers, in the order in which they went where the plan tells it.

    Args:
        plan: Any plan; columns whose values it does not carry are left out.

    Returns:
        A table to give to `rich.console.Console.print`.

    Example:
        >>> from slimformer import LayerDrop
        >>> plan_table(Plan([LayerDrop(attention=[3, 5])])).row_count
        2
    """
    summary = Summary.of(plan)
    similarities = [summary.similarity_of(step) for step in summary.steps]
    title = f"{summary.count} of {2 * summary.layers} sublayers dropped"
    if any(method.replace != "nothing" for method in plan.drops):
        title += f", in their place {summary.replacement}"
    table = Table(
        title=Text(title), title_justify="left", caption=Text(caption(plan)), caption_justify="left"
    )
    table.add_column("", justify="right", style="dim")
    table.add_column("dropped")
    columns = []
    if any(value is not None for value in similarities):
        table.add_column("similarity", justify="right")
        columns.append(["" if value is None else f"{value:.4f}" for value in similarities])
    for source, values in summary.divergences().items():
        name = f"{summary.divergence_name}: {source}" if source else summary.divergence_name
        table.add_column(Text(name), justify="right")
        columns.append(["" if value is None else figure(value) for value in values])
    for index, step in enumerate(summary.steps):
        table.add_row(
            str(index + 1) if summary.ordered else "", step.name, *(column[index] for column in columns)
        )
    return table


def methods_table(plan: Plan) -> Table:
    """What a plan does besides dropping sublayers, a row per method.

    Args:
        plan: Any plan; one that only drops gives a table without rows.

    Example:
        >>> from slimformer import TokenElimination
        >>> methods_table(Plan([TokenElimination({2: 0.5}, window=128)])).row_count
        1
    """
    table = Table(
        title=Text("methods"), title_justify="left", caption=Text(caption(plan)), caption_justify="left"
    )
    table.add_column("method")
    table.add_column("settings")
    for row in method_rows(plan):
        table.add_row(*map(Text, row))
    return table


def method_rows(plan: Plan) -> list[tuple[str, str]]:
    """Every method that is no `LayerDrop`, with the settings that are not its defaults.

    Example:
        >>> from slimformer import TokenElimination
        >>> method_rows(Plan([TokenElimination({2: 0.5}, window=128)]))
        [('TokenElimination', 'schedule 2=0.5, window 128')]
    """
    others = (method for method in plan.methods if not isinstance(method, LayerDrop))
    return [(type(method).__name__, _settings(method)) for method in others]


def _settings(method: PlannedMethod) -> str:
    # A class that anybody registers need not be a dataclass: all of its settings are shown.
    fields: Iterable[Any] = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    defaults = {field.name: words(field.default) for field in fields}
    parts = []
    for name, value in settings_of(method).items():
        if isinstance(value, Mapping):
            # As the command line takes it.
            parts.append(f"{name} " + " ".join(f"{key}={words(entry)}" for key, entry in value.items()))
        elif words(value) != defaults.get(name):
            parts.append(f"{name} {words(value)}")
    return ", ".join(parts)


def words(value: Any) -> str:
    """A value of a plan's JSON as it is shown, without what is None: it was not asked for.

    Example:
        >>> words({"model_type": "llama", "kinds": ["attention", "mlp"], "drop": None})
        'model type llama, kinds attention + mlp'
    """
    if isinstance(value, Mapping):
        known = {key.replace("_", " "): entry for key, entry in value.items() if entry is not None}
        return ", ".join(f"{key} {words(entry)}" for key, entry in known.items())
    if isinstance(value, (list, tuple)):
        return " + ".join(words(entry) for entry in value)
    return str(value)


def comparison_table(measured: Mapping[str, Any], title: str = "") -> Table:
    """Quality and speed, dense beside slim.

    Args:
        measured: `{"quality": Quality.to_dict(), "speed": SpeedComparison.to_dict()}`; either may be absent.
        title: Printed above.

    Returns:
        A table to give to `rich.console.Console.print`.

    Example:
        >>> comparison_table({"quality": {"divergence": 0.03, "agreement": 0.94}}).row_count
        2
    """
    table = Table(title=Text(title) if title else None, title_justify="left")
    table.add_column("")
    for name in ("dense", "slim", "change"):
        table.add_column(name, justify="right")
    for row in comparison(measured):
        table.add_row(*(Text(part) for part in row))
    return table


def caption(plan: Plan) -> str:
    """One line on the model a plan is for and the text it was chosen by."""
    parts = []
    if plan.fingerprint:
        family, layers = (plan.fingerprint.get(name, "?") for name in ("model_type", "layers"))
        parts.append(f"for a {family} model of {layers} layers")
    if plan.provenance.get("data"):
        tokens = plan.provenance.get("tokens")
        read = "" if tokens is None else f"{tokens} tokens of "
        parts.append(f"chosen by {read}{plan.provenance['data']}")
    return ", ".join(parts)

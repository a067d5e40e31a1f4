"""What was measured of a plan that eliminates tokens, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from slimformer.plan import Plan
from slimformer.report.tables import caption


def predictor_table(plan: Plan) -> Table:
    """How well the predictors of a plan do on text that they were not trained on, a row per layer.

    Args:
        plan: A plan that `train_predictors` made.

    Example:
        >>> from slimformer import TokenElimination
        >>> measured = {"loss": 0.2, "recall_all": 0.97, "recall_last": 0.8, "sizes": [40, 52]}
        >>> plan = Plan([TokenElimination({2: 0.5})], measured={"predictors": {"2": measured}})
        >>> predictor_table(plan).row_count
        1
    """
    columns = ("layer", "loss", "recall, all ask", "recall, last ask", "neurons")
    rows = (
        (
            layer,
            f"{found['loss']:.4f}",
            _share(found["recall_all"]),
            _share(found["recall_last"]),
            str(found["sizes"]),
        )
        for layer, found in sorted(_mapping(plan, "predictors").items(), key=lambda entry: int(entry[0]))
    )
    return _table("Predictors on held-out text", plan, columns, rows)


def curve_table(plan: Plan) -> Table:
    """Quality against FLOPs of the settings that a calibration tried, the cheapest first.

    Args:
        plan: A plan that `calibrate_elimination` made.

    Example:
        >>> from slimformer import TokenElimination
        >>> point = {"layer": 2, "keep": 0.5, "flops": 0.75, "divergence": 0.01, "chosen": True}
        >>> curve_table(Plan([TokenElimination({2: 0.5})], provenance={"curve": [point]})).row_count
        1
    """
    points = plan.provenance.get("curve")
    rows = (
        (
            str(point["layer"]),
            f"{point['keep']:g}",
            _share(point["flops"]),
            f"{point['divergence']:.4f}",
            "chosen" if point["chosen"] else "",
        )
        for point in sorted(points if isinstance(points, list) else [], key=lambda point: point["flops"])
    )
    columns = ("from layer", "keep", "prefill FLOPs", "KL to dense, nats per answer token", "")
    return _table("Settings tried", plan, columns, rows)


def _table(title: str, plan: Plan, columns: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(
        title=Text(title), title_justify="left", caption=Text(caption(plan)), caption_justify="left"
    )
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def _mapping(plan: Plan, name: str) -> Mapping[str, Any]:
    found = plan.measured.get(name)
    return found if isinstance(found, Mapping) else {}

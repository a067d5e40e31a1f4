"""What was measured of layers and of the routers in them, as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from slimformer.plan import Plan
from slimformer.report.tables import caption


def router_table(plan: Plan) -> Table:
    """What each routed sublayer computes of held-out text, beside the rank of its layer's attention maps.

    Args:
        plan: A plan that `train_routers` or `calibrate_arank` made.

    Example:
        >>> from slimformer import MixtureOfDepths
        >>> method = MixtureOfDepths.keeping_everything(hidden=4, mlp=[1])
        >>> measured = {"routers": {"divergence": 0.1, "keep": 0.5, "keep_of": {"mlp 1": 0.5}}}
        >>> router_table(Plan([method], measured=measured)).row_count
        1
    """
    found: Any = plan.measured.get("routers")
    measured: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    ranks: Any = plan.provenance.get("arank")
    title = (
        "Layers to route"
        if not measured
        else f"KL to dense {measured['divergence']:.4f}, kept {measured['keep']:.1%}"
    )
    table = Table(
        title=Text(title), title_justify="left", caption=Text(caption(plan)), caption_justify="left"
    )
    for name in ("sublayer", "ARank of the layer", "tokens computed"):
        table.add_column(name, justify="right")
    sublayers = [name for method in plan.methods for name in getattr(method, "sublayers", ())]
    for kind, layer in sublayers:
        rank = f"{ranks[layer]:.2f}" if isinstance(ranks, list) and layer < len(ranks) else ""
        kept = measured.get("keep_of", {}).get(f"{kind} {layer}")
        table.add_row(f"{kind} {layer}", rank, "" if kept is None else f"{kept:.1%}")
    return table

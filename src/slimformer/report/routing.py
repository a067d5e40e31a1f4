"""What was measured of layers and of the routers in them, as a table for a terminal and a chart for the page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from slimformer.decisions.fields import is_number
from slimformer.plans.plan import Plan
from slimformer.report.charts import round_ticks, svg, svg_text
from slimformer.report.tables import caption

_LEFT, _TOP, _WIDTH, _HEIGHT = 64.0, 26.0, 880.0, 200.0


def router_table(plan: Plan) -> Table:
    """What each routed sublayer computes of held-out text, beside the rank of its layer's attention maps.

    Args:
        plan: A plan with routers.

    Example:
        >>> from slimformer import MixtureOfDepths
        >>> method = MixtureOfDepths.keeping_everything(hidden=4, mlp=[1])
        >>> measured = {"routers": {"divergence": 0.1, "keep": 0.5, "keep_of": {"mlp 1": 0.5}}}
        >>> router_table(Plan([method], measured=measured)).row_count
        1
    """
    found: Any = plan.measured.get("routers")
    measured: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    # A plan's file may come from anywhere.
    ranks: Any = plan.provenance.get("arank")
    ranks = ranks if isinstance(ranks, list) and all(map(is_number, ranks)) else []
    divergence, keep, keep_of = (measured.get(name) for name in ("divergence", "keep", "keep_of"))
    title = "Layers to route"
    if is_number(divergence) and is_number(keep):
        title = f"KL to dense {divergence:.4f}, kept {keep:.1%}"
    table = Table(
        title=Text(title), title_justify="left", caption=Text(caption(plan)), caption_justify="left"
    )
    for name in (
        "sublayer",
        "cost of skipping" if _by_cost(plan) else "ARank of the layer",
        "tokens computed",
    ):
        table.add_column(name, justify="right")
    sublayers = [name for method in plan.methods for name in getattr(method, "sublayers", ())]
    for kind, layer in sublayers:
        rank = _shown(plan, ranks[layer]) if layer < len(ranks) else ""
        kept = keep_of.get(f"{kind} {layer}") if isinstance(keep_of, Mapping) else None
        table.add_row(f"{kind} {layer}", rank, f"{kept:.1%}" if is_number(kept) else "")
    return table


def arank_section(plan: Plan) -> str:
    """The part of a plan's page with what its layers were chosen by; empty if the plan carries nothing of that kind."""
    found = plan.provenance.get("arank")
    known = isinstance(found, list) and all(map(is_number, found))
    ranks: list[float] = list(found) if known and found else []
    if not ranks:
        return ""
    routed = {layer for method in plan.methods for _, layer in getattr(method, "sublayers", ())}
    ticks = round_ticks(max(float(rank) for rank in ranks))
    bottom, step = _TOP + _HEIGHT, _WIDTH / len(ranks)
    by_cost = _by_cost(plan)
    parts = [svg_text(_LEFT - 8, 11, "cost" if by_cost else "ARank", "start", "axis")]
    for tick in ticks:
        y = bottom - _HEIGHT * tick / ticks[-1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text(_LEFT - 8, y + 4, f"{tick:g}", "end"))
    for layer, rank in enumerate(ranks):
        height = _HEIGHT * max(float(rank), 0.0) / ticks[-1]
        x, y = _LEFT + layer * step + 2, bottom - height
        box = f'x="{x:.1f}" y="{y:.1f}" width="{step - 4:.1f}" height="{height:.1f}"'
        style = "cell attention" if layer in routed else "cell dropped attention"
        label = f"layer {layer}: {_shown(plan, rank)}{', routed' if layer in routed else ''}"
        parts.append(f'<rect class="{style}" {box}><title>{escape(label)}</title></rect>')
        if layer % max(round(26 / step), 1) == 0:
            parts.append(svg_text(_LEFT + (layer + 0.5) * step, bottom + 18, str(layer), "middle"))
    parts.append(svg_text(_LEFT + _WIDTH / 2, bottom + 38, "layer", "middle", "axis"))
    title, named, text = _COST if by_cost else _RANK
    drawing = svg(_LEFT + _WIDTH + 16, bottom + 48, named, parts)
    return f'<section><h2>{title}</h2><p>{escape(text)}</p><div class="scroll">{drawing}</div></section>'


# A title, what the drawing shows, and what it means.
_RANK = (
    "Attention maps",
    "Rank of every layer's attention maps",
    "How much each layer's attention maps say. Layers that say little are routed (filled); the first three and the "
    "last never.",
)
_COST = (
    "What skipping costs",
    "What skipping every layer would cost",
    "The part of the divergence from dense that skipping all tokens of a layer would bring. Layers that cost little "
    "are routed (filled); the first three and the last never.",
)


def _by_cost(plan: Plan) -> bool:
    return plan.provenance.get("layers_by") == "skip_cost"


def _shown(plan: Plan, value: float) -> str:
    return f"{float(value):.4f}" if _by_cost(plan) else f"{float(value):.2f}"

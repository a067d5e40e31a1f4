"""One self-contained HTML page for a plan: no script, no font and no image from anywhere else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from importlib import resources
from itertools import count
from string import Template
from typing import Any

from slimformer.plans.plan import Plan
from slimformer.report.charts import SHORT_STEPS, divergence_chart, marker, similarity_chart
from slimformer.report.elastic import elastic_section
from slimformer.report.elimination import curve_section
from slimformer.report.narrow import narrow_rows
from slimformer.report.optimization.points import found_in
from slimformer.report.optimization.section import optimize_section
from slimformer.report.panel import panel_section
from slimformer.report.repair import repair_section
from slimformer.report.routing import arank_section
from slimformer.report.summary import NAMES, Summary, comparison, figure
from slimformer.report.tables import caption, method_rows, words
from slimformer.report.temperature import temperature_section

# Provenance that has a section of its own.
_SHOWN_ELSEWHERE = {
    "similarity",
    "steps",
    "divergence_name",
    "elastic",
    "repair",
    "temperature",
    "narrow",
    "optimize",
}


def plan_page(plan: Plan) -> str:
    """A page that shows what a plan drops, why, and what was measured with it.

    It holds what is kept of every capability, the similarity of every sublayer with the dropped ones marked, the
    removals in order, the divergence against the number of drops, quality and speed beside dense, and the provenance.
    A part whose values the plan does not carry is left out. All text from the plan is escaped.

    Args:
        plan: Any plan.

    Returns:
        A whole HTML document, to be written as UTF-8.

    Example:
        >>> from slimformer import LayerDrop
        >>> plan_page(Plan([LayerDrop(attention=[3])])).splitlines()[0]
        '<!doctype html>'
    """
    summary = Summary.of(plan)
    template = resources.files("slimformer.report").joinpath("page.html").read_text(encoding="utf-8")
    names = ", ".join(dict.fromkeys(type(method).__name__ for method in plan.methods))
    heading = f"{summary.count} of {2 * summary.layers} sublayers dropped" if summary.count else names
    body = (
        _tiles(plan),
        optimize_section(plan),
        panel_section(plan),
        elastic_section(plan),
        curve_section(plan),
        arank_section(plan),
        repair_section(plan),
        temperature_section(plan),
        _narrow_section(plan),
        _similarity_section(summary) if summary.count else "",
        _steps_section(summary) if summary.count else "",
        _measured_section(plan),
        _provenance_section(plan, summary),
    )
    return Template(template).substitute(
        title=escape(f"{heading} – slimformer plan"),
        heading=escape(heading),
        lead=escape(caption(plan)[:1].upper() + caption(plan)[1:] + "." if caption(plan) else ""),
        body="\n".join(part for part in body if part),
    )


def _tiles(plan: Plan) -> str:
    tiles = []
    for row in comparison(plan.measured):
        value = f"{row.dense} → {row.slim}" if row.name == "Perplexity" else row.change or row.slim
        # The tile's own heading says what the figure is of.
        value = value.removesuffix(" as fast")
        name = row.name + (" speed" if row.change.endswith("fast") else "")
        tiles.append(f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>')
    return f'<div class="tiles">{"".join(tiles)}</div>' if tiles else ""


def _similarity_section(summary: Summary) -> str:
    measured = [kind for kind in ("attention", "mlp") if summary.similarity[kind]]
    heading, text = "Sublayers", "The model from its first layer (left) to its last."
    if measured:
        heading = "Similarity of every sublayer"
        text = (
            "Cosine between the residual stream before and after the sublayer: the nearer to 1, the less it "
            "changes. The axis is stretched towards 1. Below, the model from its first layer to its last."
        )
    if summary.ordered:
        text += " Numbers, where they fit, give the order of removal."
    keys = [(marker(kind, 8, 8, 4, False, NAMES[kind]), NAMES[kind]) for kind in measured]
    if measured:
        keys.append((marker("attention", 8, 8, 3.5, True, "dropped"), "ringed: dropped"))
    keys.append(('<rect class="cell attention" x="1" y="1" width="20" height="14" rx="3"/>', "runs"))
    keys.append(
        ('<rect class="cell dropped attention" x="1" y="1" width="20" height="14" rx="3"/>', "dropped")
    )
    legend = "".join(
        f'<li><svg viewBox="0 0 22 16" aria-hidden="true">{shape}</svg>{escape(name)}</li>'
        for shape, name in keys
    )
    chart = similarity_chart(summary).replace("<svg ", '<svg class="wide" ', 1)
    values = ""
    if measured:
        rows = [
            [str(layer)]
            + [
                f"{summary.similarity[kind][layer]:.4f}{', dropped' * (layer in summary.dropped[kind])}"
                if layer < len(summary.similarity[kind])
                else ""
                for kind in measured
            ]
            for layer in range(summary.layers)
        ]
        table = _table(["Layer", *(NAMES[kind] for kind in measured)], rows, words=0)
        values = f'<details><summary>All values</summary><div class="long">{table}</div></details>'
    return (
        f"<section><h2>{heading}</h2><p>{text}</p>"
        f'<ul class="legend">{legend}</ul><div class="scroll">{chart}</div>{values}</section>'
    )


def _steps_section(summary: Summary) -> str:
    similarities = [summary.similarity_of(step) for step in summary.steps]
    names = ["", "Dropped"]
    numbers = [f"{n}." if summary.ordered else "" for n in range(1, len(summary.steps) + 1)]
    columns = [numbers, [step.name for step in summary.steps]]
    divergences = {source or "Divergence": values for source, values in summary.divergences().items()}
    for name, values in {"Similarity": similarities, **divergences}.items():
        if any(value is not None for value in values):
            names.append(name)
            columns.append(["" if value is None else figure(value) for value in values])
    rows = [list(row) for row in zip(*columns, strict=True)]
    chart = divergence_chart(summary)
    text = f"{'In order. ' * summary.ordered}Left in their place: {summary.replacement}."
    if chart:
        text += f" Divergence: {summary.divergence_name}, measured after each removal while calibrating"
        text += ", of every source; the curve is the largest of them." if len(divergences) > 1 else "."
    long = " stacked" if len(summary.steps) > SHORT_STEPS else ""
    drawing = f'<div class="scroll{long}">{chart}</div>' if chart else ""
    table = f'<div class="long">{_table(names, rows, words=2)}</div>'
    return f'<section><h2>What was dropped</h2><p>{escape(text)}</p><div class="pair">{drawing}{table}</div></section>'


def _narrow_section(plan: Plan) -> str:
    rows = narrow_rows(plan)
    if not rows:
        return ""
    table = _table([rows[0][0].capitalize(), rows[0][1]], rows[1:], words=1)
    text = "Quality by the fraction of hidden units that stay, measured while calibrating."
    return f'<section><h2>Narrow MLPs</h2><p>{text}</p><div class="scroll">{table}</div></section>'


def _measured_section(plan: Plan) -> str:
    rows = comparison(plan.measured)
    if not rows and found_in(plan):
        return ""
    if not rows:
        return (
            "<section><h2>Measured</h2><p>Nothing yet. <code>slimformer eval</code> and <code>slimformer bench</code> "
            "with <code>--save</code> measure quality and speed beside the dense model and keep both in the plan."
            "</p></section>"
        )
    table = _table(["", "Dense", "Slim", "Change"], [list(row) for row in rows], words=1)
    settings = [
        f"{key.replace('_', ' ')} {value}"
        for part in ("quality", "task", "speed")
        for key, value in _mapping(plan.measured.get(part)).items()
        if isinstance(value, (int, str)) and not isinstance(value, bool)
    ]
    note = f"<p>{escape(', '.join(settings))}</p>" if settings else ""
    return (
        f'<section><h2>Measured, beside the dense model</h2>{note}<div class="scroll">{table}</div></section>'
    )


def _provenance_section(plan: Plan, summary: Summary) -> str:
    shown = {name: value for name, value in plan.provenance.items() if name not in _SHOWN_ELSEWHERE}
    rows = [list(row) for row in method_rows(plan)]
    if summary.count:
        rows.append(["Left in place", summary.replacement])
    for kind, layers in summary.dropped.items():
        if layers:
            rows.append([f"Dropped {NAMES[kind]}", ", ".join(map(str, layers))])
    rows += [[name.replace("_", " ").capitalize(), words(value)] for name, value in shown.items()]
    if plan.fingerprint:
        rows.append(["Made for", words(plan.fingerprint)])
    table = _table(["", ""], rows, words=2).replace("<table>", '<table class="facts">', 1)
    whole = escape(json.dumps(plan.to_dict(), indent=2, ensure_ascii=False))
    return (
        f"<section><h2>Provenance</h2>{table}"
        f'<details><summary>The plan’s file</summary><pre class="long"><code>{whole}</code></pre></details></section>'
    )


def _table(names: Iterable[str], rows: Iterable[Iterable[str]], words: int) -> str:
    """A table whose first `words` columns are words and whose others are numbers, set to the right."""

    def row(tag: str, values: Iterable[str]) -> str:
        opened = (f"<{tag}>" if i < words else f'<{tag} class="number">' for i in count())
        cells = (f"{start}{escape(value)}</{tag}>" for start, value in zip(opened, values, strict=False))
        return f"<tr>{''.join(cells)}</tr>"

    names = list(names)
    head = f"<thead>{row('th', names)}</thead>" if any(names) else ""
    return f"<table>{head}<tbody>{''.join(row('td', values) for values in rows)}</tbody></table>"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}

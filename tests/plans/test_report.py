"""A plan's page is whole, self-contained and safe, and shows every sublayer; tables show what was measured."""

from __future__ import annotations

import itertools
import math
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from slimformer import LayerDrop, MixtureOfDepths, Plan, TokenElimination
from slimformer.errors import PlanError
from slimformer.report import comparison_table, plan_page, plan_table, repair_table

QUALITY = {"perplexity_dense": 24.92, "perplexity_slim": 26.41, "divergence": 0.0613, "agreement": 0.871}
SPEED = {
    "dense": {"prefill_seconds": 1.2, "decode_seconds_per_token": 0.06, "cache_bytes": 12 * 2**20},
    "slim": {"prefill_seconds": 1.0, "decode_seconds_per_token": 0.05, "cache_bytes": 9 * 2**20},
    "prompt_tokens": 512,
}
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element must be closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.titles: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if self.open[-1:] == ["title"] and "svg" in self.open:
            self.titles.append(data)


def plan_of(layers: int, attention: list[int], mlp: list[int], **provenance: Any) -> Plan:
    similarity = {
        "attention": [1 - 0.4 / (i + 1) for i in range(layers)],
        "mlp": [math.cos(i) / 9 + 0.8 for i in range(layers)],
    }
    steps = [{"kind": "attention", "layer": i, "divergence": 0.01 * n} for n, i in enumerate(attention, 1)]
    steps += [{"kind": "mlp", "layer": i, "divergence": 0.1 * n} for n, i in enumerate(mlp, 1)]
    return Plan(
        [LayerDrop(attention=attention, mlp=mlp)],
        {"model_type": "llama", "layers": layers},
        {"similarity": similarity, "steps": steps, "data": "a text", "tokens": 64, **provenance},
        {"quality": QUALITY, "speed": SPEED},
    )


@pytest.mark.parametrize(("layers", "attention", "mlp"), [
    (6, [3], [0, 5]), (30, [25, 7, 9, 12], []), (80, list(range(40, 70)), [79, 3]), (1, [0], []),
])  # fmt: skip
def test_the_page_draws_every_sublayer_and_marks_every_dropped_one(
    layers: int, attention: list[int], mlp: list[int]
) -> None:
    text = plan_page(plan_of(layers, attention, mlp))
    page = Page(text)
    for name, dropped in (("attention", attention), ("MLP", mlp)):
        drawn = [title for title in page.titles if title.startswith(name + " ") and ": 0." in title]
        assert len(drawn) == layers
        assert sorted(int(t.split()[1][:-1]) for t in drawn if "dropped" in t) == sorted(dropped)
        cells = [title for title in page.titles if title.startswith(name + " ") and "removal" in title]
        assert sorted(int(t.split()[1][:-1]) for t in cells) == sorted(dropped)
    for chart in charts(text):
        ElementTree.fromstring(chart)


def test_nothing_drawn_lies_outside_its_chart_and_labels_do_not_touch() -> None:
    text = plan_page(plan_of(80, list(range(40, 70)), [79, 3]))
    chart = next(ElementTree.fromstring(svg) for svg in charts(text) if 'class="wide"' in svg)
    _, _, width, height = map(float, chart.attrib["viewBox"].split())
    for element in chart.iter():
        for name, limit in (("x", width), ("cx", width), ("y", height), ("cy", height)):
            assert 0 <= float(element.get(name, 0)) <= limit
    labels = [e for e in chart.iter("text") if e.get("text-anchor") == "middle" and (e.text or "").isdigit()]
    places = sorted(float(e.attrib["x"]) for e in labels if e.get("class") == "tick")
    assert min(b - a for a, b in itertools.pairwise(places)) > 15


def test_the_page_fetches_nothing_and_follows_light_and_dark() -> None:
    text = plan_page(plan_of(6, [3], []))
    tags = Page(text).tags
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in tags}
    assert not {"src", "href"} & {name for _, attributes in tags for name in attributes}
    assert "url(" not in text
    assert "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_text_from_the_plan_is_escaped_everywhere() -> None:
    evil = "</title><script>alert('x')</script>\"'&"
    plan = plan_of(4, [1], [], data=evil, divergence_name=evil, arguments={evil: evil})
    plan = Plan(
        plan.methods, {"model_type": evil, "layers": 4}, plan.provenance, {"quality": {**QUALITY, evil: evil}}
    )
    page = Page(plan_page(plan))
    assert "script" not in {tag for tag, _ in page.tags}
    assert any(evil in text for text in page.text)


@pytest.mark.parametrize("provenance", [
    {}, {"similarity": 3, "steps": "none"}, {"similarity": {"attention": ["x"], "mlp": [float("nan")]}},
    {"steps": [{"kind": "attention"}]}, {"steps": [{"kind": "tail", "layer": 1}], "divergence_name": 7},
    {"similarity": {"attention": [0.9]}, "steps": [{"kind": "attention", "layer": 1, "divergence": None}]},
])  # fmt: skip
def test_a_plan_without_usable_provenance_still_has_a_page_and_a_table(provenance: dict[str, Any]) -> None:
    plan = Plan([LayerDrop(attention=[1], block=[2])], provenance=provenance)
    titles = Page(plan_page(plan)).titles
    assert sum("dropped" in title for title in titles) >= 3
    assert printed(plan_table(plan)).count("attention 1") == 1


def test_equal_similarities_and_divergences_of_zero_are_drawn() -> None:
    plan = plan_of(3, [1], [], similarity={"attention": [1.0] * 3, "mlp": [1.0] * 3})
    flat = Plan(
        plan.methods,
        plan.fingerprint,
        {**plan.provenance, "steps": [{"kind": "attention", "layer": 1, "divergence": 0.0}]},
    )
    assert "nan" not in plan_page(flat).lower().split("<body>")[1].split("provenance")[0]


def test_the_plan_table_lists_the_removals_in_order_with_their_values() -> None:
    lines = printed(plan_table(plan_of(6, [3, 1], [0]))).splitlines()
    rows = [line for line in lines if "attention" in line or "MLP" in line]
    assert [row.split("│")[2].strip() for row in rows[-3:]] == ["attention 3", "attention 1", "MLP 0"]
    assert "0.0200" in rows[-2]
    assert "3 of 12 sublayers dropped" in lines[0]


def test_the_comparison_has_dense_slim_and_change() -> None:
    text = printed(comparison_table({"quality": QUALITY, "speed": SPEED}, "[red]figures"))
    assert "[red]figures" in text
    for row in (
        ("24.92", "26.41", "+6.0%"),
        ("1.20 s", "1.00 s", "1.20× as fast"),
        ("12.0 MiB", "9.0 MiB", "−25.0%"),
    ):
        assert any(all(part in line for part in row) for line in text.splitlines())
    assert "87.1%" in text


def test_absent_and_infinite_figures_do_not_break_the_comparison() -> None:
    text = printed(comparison_table({
        "quality": {"perplexity_dense": 20.0, "perplexity_slim": float("inf"), "divergence": None},
        "speed": {"dense": {"prefill_seconds": 1.0, "cache_bytes": None}, "slim": {"prefill_seconds": 2.0}},
    }))  # fmt: skip
    assert "inf" in text
    assert "0.50× as fast" in text
    assert "KV cache" not in text


def test_a_plan_that_names_impossible_layers_is_refused_before_anything_is_drawn() -> None:
    for plan in (Plan([LayerDrop(attention=[10**9])]), Plan([LayerDrop(mlp=[1])], {"layers": 10**9})):
        with pytest.raises(PlanError, match="layers"):
            plan_page(plan)


def charts(page: str) -> list[str]:
    return re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)


def printed(table: Any) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_page_draws_the_curve_of_an_elimination_and_the_ranks_of_attention_maps() -> None:
    point = {"layer": 2, "keep": 0.5, "flops": 0.75, "divergence": 0.01, "chosen": True}
    curve = [point, {**point, "keep": 0.25, "flops": 0.6, "chosen": False}, {"layer": "<b>"}, None]
    page = plan_page(Plan([TokenElimination({2: 0.5})], provenance={"curve": curve}))
    assert "0.5 from layer 2 on: 0.0100" in page
    assert page.count("<circle") == 2
    assert "What was dropped" not in page
    method = MixtureOfDepths.keeping_everything(hidden=4, attention=[4])
    page = plan_page(Plan([method], provenance={"arank": [3.0, 2.0, 4.0, 5.0, 1.0, 6.0]}))
    assert "layer 4: 1.00, routed" in page
    assert "layer 5: 6.00, routed" not in page
    assert "Attention maps" not in plan_page(Plan([method], provenance={"arank": ["<b>"]}))
    by_cost = plan_page(Plan([method], provenance={"arank": [3.0, 2.0, 0.5], "layers_by": "skip_cost"}))
    assert "What skipping costs" in by_cost
    assert "Attention maps" not in by_cost


def test_a_repaired_plan_shows_the_curve_of_every_round() -> None:
    rounds: list[Any] = [
        {"dropped": 1, "held_out": {"0": 0.4, "25": 0.25, "50": 0.3}, "best": 25, "losses": [0.3] * 50},
        {"dropped": 2, "held_out": {"0": 0.5, "25": 0.2}, "best": 25, "losses": [0.3] * 25},
    ]
    plan = Plan([LayerDrop(attention=[1, 2])], provenance={"repair": rounds})
    page = Page(plan_page(plan))
    assert "Divergence from dense on text that was not trained on: 0.4 before, 0.2 after." in " ".join(
        page.text
    )
    assert {"round 1, step 25: 0.25, kept", "round 1, step 50: 0.3", "round 2, step 0: 0.5"} <= set(
        page.titles
    )
    console = Console(width=120, record=True)
    console.print(repair_table(plan))
    printed = console.export_text()
    assert "38%" in printed
    assert "60%" in printed
    for broken in ("text", [3], [{"held_out": {"a": 1.0}}], [{"held_out": {"0": math.nan}}]):
        damaged = Plan([LayerDrop(attention=[1])], provenance={"repair": broken})
        assert "<h2>Repair" not in plan_page(damaged)
        assert repair_table(damaged).row_count == 0


def test_what_narrow_mlps_cost_is_a_table_of_the_page() -> None:
    narrow = {"name": "Spearman × 100", "dense": 85.05998, "curve": [{"keep": 0.5, "score": 82.4857}]}
    text = " ".join(Page(plan_page(Plan([LayerDrop(mlp=[0])], provenance={"narrow": narrow}))).text)
    before, table, after = text.partition("Hidden units that stay")
    assert table
    assert "82.49" in after
    # As it lies in the plan's file, and nowhere else on the page.
    assert (before + after).count("85.05998") == 1


def test_what_reads_once_has_no_prefill() -> None:
    speed = {"dense": {"prefill_seconds": 2.0}, "slim": {"prefill_seconds": 1.0}, "decode_speedup": None}
    for given, name in ((speed, "Forward"), (SPEED, "Prefill")):
        assert next(iter(comparison_table({"speed": given}).columns[0].cells)).plain == name

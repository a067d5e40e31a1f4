"""`slimformer show`: a plan as tables, JSON and a page."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import run
from slimformer import Plan, TokenElimination
from slimformer.plans.plan import FILE


def test_show_says_what_a_plan_does_that_drops_nothing(tmp_path: Path) -> None:
    Plan([TokenElimination({3: 0.5}, window=128)]).save_pretrained(tmp_path)
    page = tmp_path / "plan.html"
    shown = run("show", tmp_path, "--html", page).stdout
    assert "schedule 3=0.5, window 128 " in shown
    assert "dropped" not in shown
    assert "schedule 3=0.5, window 128<" in page.read_text(encoding="utf-8")
    assert "Left in place" not in page.read_text(encoding="utf-8")


def test_show_prints_the_plan_as_table_json_and_page(plan: str, tmp_path: Path) -> None:
    assert "attention 1" in run("show", plan).stdout
    result = run("show", plan, "--json", "--html", tmp_path / "pages" / "plan.html")
    assert json.loads(result.stdout) == json.loads(Path(plan, FILE).read_text())
    page = (tmp_path / "pages" / "plan.html").read_text(encoding="utf-8")
    assert "attention 1: dropped" in page
    assert "MLP 2: dropped" in page
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["plan.html"]

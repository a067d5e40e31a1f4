"""`slimformer repair`: a plan nearer to dense, or one line on why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import refused, run
from slimformer import LayerDrop, Plan


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_repair_writes_a_plan_that_is_nearer_to_dense_and_says_so(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    Plan([LayerDrop(attention=[1], mlp=[2])]).save_pretrained(tmp_path / "plan")
    arguments = (
        "repair",
        model,
        "--plan",
        tmp_path / "plan",
        "--length",
        32,
        "--steps",
        6,
        "--set",
        "every=3",
        "--set",
        "panel=null",
    )
    result = run(*arguments, "--what", "norms,lora", "--set", "near=null", "-o", tmp_path / "repaired")
    assert "won back" in result.stdout
    plan = Plan.from_pretrained(tmp_path / "repaired")
    assert [type(method).__name__ for method in plan.methods] == ["LayerDrop", "WeightDelta"]
    measured = plan.measured["repair"]
    assert measured["divergence_after"] <= measured["divergence_before"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "repaired"]
    shown = run("show", tmp_path / "repaired", "--html", tmp_path / "page.html")
    assert "Repair" in shown.stdout
    assert "<h2>Repair</h2>" in (tmp_path / "page.html").read_text()
    # What it was measured on is left out of what it was trained on.
    assert (
        "held-out" in json.loads(run("eval", model, "--plan", tmp_path / "repaired", "--json").stdout)["data"]
    )


def test_repair_refuses_in_one_line(llama: str, plan: str, tmp_path: Path) -> None:
    repair = ("repair", llama, "--plan", plan, "-o", tmp_path / "out", "--length", 32)
    assert "what takes some of added, norms, lora" in refused(*repair, "--what", "all")
    assert "nothing to train of added" in refused(*repair, "--what", "added")
    assert "rounds must be from 1" in refused(*repair, "--rounds", 9)
    (tmp_path / "short.txt").write_text("Two words.")
    assert "Give more text" in refused(*repair, "--data", tmp_path / "short.txt")
    assert not (tmp_path / "out").exists()


def test_a_repair_that_wins_nothing_says_so_and_exits_with_its_own_code(
    llama: str, plan: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("All work and no play makes a dull text. " * 60)
    result = run(
        *("repair", llama, "--plan", plan, "-o", tmp_path / "out", "--length", 32, "--steps", 2),
        *("--data", tmp_path / "text.txt", "--set", "rank=1", "--set", "learning_rate=1e-9"),
        *("--set", "panel=null", "--minutes", 0),
        code=4,
    )
    assert "Nothing was won: the divergence from dense is" in result.stderr
    assert "nothing was won" in result.stdout
    left = Plan.from_pretrained(tmp_path / "out")
    assert left.methods == Plan.from_pretrained(plan).methods
    shown = run("show", tmp_path / "out", "--html", tmp_path / "page.html")
    assert "nothing was won" in shown.stdout
    assert "Nothing was won" in (tmp_path / "page.html").read_text()


def test_weights_of_sources_that_are_no_numbers_are_refused_in_one_line(
    llama: str, plan: str, tmp_path: Path
) -> None:
    repair = ("repair", llama, "--plan", plan, "-o", tmp_path / "out", "--length", 32)
    assert "The weight of 'a.txt' is 'two'" in refused(*repair, "--data", "a.txt=two")
    assert "The weight of 'own-words' is 0.0" in refused(
        *repair, "--data", "own-words=0", "--data", "copying"
    )

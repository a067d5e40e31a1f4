"""`slimformer optimize`: a plan with its page, an exit code that says whether anything was won, wrong usage."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from command_line import refused, run, wrong
from slimformer import LayerDrop, Plan
from slimformer.cli.commands.optimize import fraction
from slimformer.cli.output import NOTHING_WON
from slimformer.optimization.proposing import search

QUICK = ("--for", "memory", "--prompt", 48, "--minutes", 3, "--set", "repair=false")


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MOST", 2)


def test_a_plan_and_its_page_are_written_and_all_that_was_tried_is_printed(
    llama: str, tmp_path: Path
) -> None:
    result = run("optimize", llama, "-o", tmp_path / "plan", *QUICK, "--max-loss", "60%")
    plan = Plan.from_pretrained(tmp_path / "plan")
    tried = plan.measured["optimize"]["candidates"]
    assert "chosen" in result.stdout
    curve, _, table = result.stdout.partition("Optimized for memory")
    assert table.count("×") == len(tried) == 3
    assert curve.count("●") == 2
    assert "slimformer export" in result.stderr
    page = (tmp_path / "plan" / "plan.html").read_text(encoding="utf-8")
    assert all(entry["what"] in page for entry in tried)
    assert "losing at most 60% on average and 120% of each" in page
    # Nothing but the plan is left, and it is shown again.
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]
    shown = run("show", tmp_path / "plan")
    assert "Optimized for memory of 48 tokens" in shown.stdout


def test_where_nothing_fits_the_exit_code_says_so_and_the_page_shows_what_was_tried(
    llama: str, tmp_path: Path
) -> None:
    result = run(
        "optimize", llama, "-o", tmp_path / "plan", *QUICK, "--max-loss", "0.000001%", code=NOTHING_WON
    )
    assert Plan.from_pretrained(tmp_path / "plan").methods == (LayerDrop(),)
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("Nothing was won: nothing that was tried is smaller than dense")
    assert "the nearest" in last
    assert "Nothing was chosen" in (tmp_path / "plan" / "plan.html").read_text(encoding="utf-8")


def test_text_shorter_than_the_prompt_is_said_in_one_line(llama: str, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("A few words only.\n\nAnd a few more.")
    said = refused("optimize", llama, "-o", tmp_path / "plan", *QUICK, "--data", short)
    assert "A prompt has 48 tokens, and file short.txt" in said
    assert "ask for a shorter prompt" in said


def test_too_few_minutes_keep_what_was_measured(llama: str, tmp_path: Path) -> None:
    said = refused("optimize", llama, "-o", tmp_path / "plan", "--for", "memory", "--minutes", 0.0001)
    assert "too few for one round" in said
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(("typed", "value"), [("2%", 0.02), ("0.5 %", 0.005), ("0.02", 0.02), ("0", 0.0)])
def test_a_loss_is_a_percentage_or_a_fraction(typed: str, value: float) -> None:
    assert fraction(typed) == pytest.approx(value)


@pytest.mark.parametrize("typed", ["2", "two", "-1%", "100%", "2%%", "%", "nan"])
def test_another_loss_is_wrong_usage(llama: str, tmp_path: Path, typed: str) -> None:
    said = wrong("optimize", llama, "-o", tmp_path / "p", "--for", "memory", f"--max-loss={typed}")
    assert "takes a percentage such as 2% or a fraction such as 0.02" in said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--for", "speed"), "prefill"),
        (("--for", "memory", "--max-loss", "2%", "--speedup", 2), "not both"),
        (("--for", "memory", "--set", "seed=many"), "--set seed=... takes a whole number"),
        (("--for", "memory", "--set", "taps=3"), "taps does not apply to optimize"),
    ],
)
def test_what_does_not_apply_is_wrong_usage(
    llama: str, tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    assert said in wrong("optimize", llama, "-o", tmp_path / "p", *options)


def test_without_ray_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "ray"]:
        monkeypatch.delitem(sys.modules, name)
    # As Python finds it where it is not installed.
    monkeypatch.setitem(sys.modules, "ray", None)
    said = refused("optimize", "my-model", "-o", tmp_path / "p", "--for", "memory", "--ray", "local")
    assert 'pip install "slimformer[ray]"' in said


def test_a_goal_that_does_not_suit_the_model_is_refused(llama: str, bert: str, tmp_path: Path) -> None:
    assert "predicts tokens" in refused("optimize", llama, "-o", tmp_path / "p", "--for", "encode")
    assert "the goal is 'encode'" in refused("optimize", bert, "-o", tmp_path / "p", "--for", "generate")

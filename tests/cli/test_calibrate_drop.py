"""`slimformer calibrate drop`: the plan on disk, what it was chosen by on standard output, nothing lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import slimformer
from command_line import refused, run
from slimformer import Plan
from slimformer.cli.loading import load_model
from slimformer.plans.plan import FILE
from slimformer.report import plan_page


def test_calibrate_writes_a_plan_for_the_model_and_prints_it(llama: str, tmp_path: Path) -> None:
    result = run("calibrate", "drop", llama, "-o", tmp_path / "plan", "--drop", 2)
    plan = Plan.from_pretrained(tmp_path / "plan")
    (method,) = plan.methods
    assert len(method.attention) == 2
    for layer in method.attention:
        assert f"attention {layer}" in result.stdout
    assert slimformer.status(slimformer.patch(load_model(llama), plan))
    assert [path.name for path in tmp_path.iterdir()] == ["plan"]


@pytest.mark.parametrize(("kinds", "expected"), [
    ("mlp", {"mlp"}), ("block", {"block"}), ("attention,mlp", {"attention", "mlp"}),
])  # fmt: skip
def test_calibrate_drops_only_the_kinds_asked_for(
    llama: str, tmp_path: Path, kinds: str, expected: set[str]
) -> None:
    run("calibrate", "drop", llama, "-o", tmp_path / "p", "--drop", 1, "--kinds", kinds)
    (method,) = Plan.from_pretrained(tmp_path / "p").methods
    assert {kind for kind in ("attention", "mlp", "block") if getattr(method, kind)} <= expected


@pytest.mark.parametrize("replace", ["mean", "filter"])
def test_a_fitted_replacement_is_saved_with_the_plan_and_kept_with_the_figures(
    llama: str, tmp_path: Path, replace: str
) -> None:
    taps = ("--set", "taps=2") if replace == "filter" else ()
    printed = run("calibrate", "drop", llama, "-o", tmp_path / "p", "--drop", 1, "--replace", replace, *taps)
    arguments = ("eval", llama, "--plan", tmp_path / "p", "--blocks", 2, "--json")
    first = json.loads(run(*arguments, "--save").stdout)
    assert json.loads(run(*arguments).stdout) == first
    left = {"mean": "the mean", "filter": "a causal filter of 2 taps"}[replace]
    assert left in plan_page(Plan.from_pretrained(tmp_path / "p"))
    assert f"in their place {left}" in " ".join(printed.stdout.split())


def test_calibrate_reads_the_text_it_is_given(llama: str, tmp_path: Path) -> None:
    text = "\n\n".join(f"Paragraph {i} says a little about nothing much." * 9 for i in range(99))
    (tmp_path / "own.txt").write_text(text)
    arguments = ("calibrate", "drop", llama, "--drop", 1, "--data")
    run(*arguments, tmp_path / "own.txt", "-o", tmp_path / "a")
    assert Plan.from_pretrained(tmp_path / "a").provenance["data"].split("; ")[1].startswith("file own.txt")
    run(*arguments, "-", "-o", tmp_path / "b", typed=text)
    assert Plan.from_pretrained(tmp_path / "b").provenance["data"].split("; ")[1].startswith("standard input")
    (tmp_path / "own.jsonl").write_text(
        "\n".join(json.dumps({"body": line}) for line in text.splitlines() if line)
    )
    run(
        *arguments,
        tmp_path / "own.jsonl",
        "-o",
        tmp_path / "c",
        "--set",
        "text_field=body",
        "--set",
        "seed=3",
    )
    provenance = Plan.from_pretrained(tmp_path / "c").provenance
    assert provenance["data"].split("; ")[1].startswith("file own.jsonl")
    assert provenance["arguments"]["seed"] == 3


def test_calibrate_refuses_too_little_text_and_keeps_nothing(llama: str, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Two words.")
    (tmp_path / "empty.txt").write_text("\n\n")
    for name in ("short.txt", "empty.txt"):
        assert "text" in refused(
            "calibrate", "drop", llama, "-o", tmp_path / "p", "--drop", 1, "--data", tmp_path / name
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "short.txt"]


def test_an_encoder_is_calibrated_and_measured(bert: str, tmp_path: Path) -> None:
    run("calibrate", "drop", bert, "-o", tmp_path / "p", "--drop", 1)
    quality = json.loads(run("eval", bert, "--plan", tmp_path / "p", "--json").stdout)
    assert 0 < quality["embedding_cosine"] < 1
    bench = ("bench", bert, "--plan", tmp_path / "p", "--prompt-tokens", 8, "--repeats", 1)
    assert "8 tokens read, batch 1" in run(*bench).stdout
    speed = json.loads(run(*bench, "--json").stdout)
    assert speed["decode_speedup"] is None


def test_an_output_folder_with_other_files_is_refused_and_untouched(llama: str, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter").write_text("one")
    for force in ([], ["--force"]):
        message = refused("calibrate", "drop", llama, "-o", folder, "--drop", 1, *force)
        assert "not empty and holds no plan" in message
    assert (folder / "chapter").read_text() == "one"
    assert "is a file" in refused("calibrate", "drop", llama, "-o", folder / "chapter", "--drop", 1)
    assert [path.name for path in folder.iterdir()] == ["chapter"]


def test_a_plan_in_the_output_folder_is_replaced_only_with_force(llama: str, plan: str) -> None:
    before = Path(plan, FILE).read_text()
    assert "--force" in refused("calibrate", "drop", llama, "-o", plan, "--drop", 1)
    assert Path(plan, FILE).read_text() == before
    run("calibrate", "drop", llama, "-o", plan, "--drop", 1, "--force")
    assert Path(plan, FILE).read_text() != before


def test_a_failed_save_keeps_the_old_plan_and_the_partial_results(
    llama: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path(plan, FILE).read_text()
    replace = os.replace

    def full(source: str, target: str) -> None:
        if Path(target).name == FILE:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("os.replace", full)
    assert "No space left" in refused("calibrate", "drop", llama, "-o", plan, "--drop", 1, "--force")
    assert Path(plan, FILE).read_text() == before
    assert any(Path(plan + ".slimformer-partial").iterdir())


# Interrupts itself while it replaces its partial results for the first time, as Ctrl-C may at any moment.
INTERRUPTED = """
import signal, sys
written = 0
def interrupt(event, arguments):
    global written
    if event == "os.rename" and ".slimformer-partial" in str(arguments[1]):
        written += 1
        # What the model wrote, similarity, then what candidates cost alone.
        if written == 3:
            signal.raise_signal(signal.SIGINT)
sys.addaudithook(interrupt)
from slimformer.cli import main
main()
"""


def test_ctrl_c_keeps_partial_results_and_the_same_command_resumes(llama: str, tmp_path: Path) -> None:
    folder, partial = tmp_path / "plan", tmp_path / "plan.slimformer-partial"
    command = ("calibrate", "drop", llama, "--drop", "3", "-o")
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command, str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stdout == ""
    assert "Traceback" not in stopped.stderr
    assert f"Partial results are in {partial}" in stopped.stderr
    assert any(partial.iterdir())
    assert not folder.exists()
    kept = (partial / "calibration.json").read_bytes()
    resumed = run(*command, folder).stderr
    assert f"Going on from the partial results in {partial}" in resumed
    assert "Removal 3 of 3: attention" in resumed
    assert not partial.exists()
    other = tmp_path / "other.slimformer-partial"
    other.mkdir()
    (other / "calibration.json").write_bytes(kept)
    anew = run(*command, tmp_path / "other", "--set", "seed=1").stderr
    assert "of another text, model or setting: starting anew" in anew
    run(*command, tmp_path / "whole")
    assert Plan.from_pretrained(folder).methods == Plan.from_pretrained(tmp_path / "whole").methods

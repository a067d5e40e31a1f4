"""The panel on the command line, in a plan and on its page."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from embedding_data import beir, pipeline
from slimformer import LayerDrop, Plan
from slimformer.cli import app
from slimformer.evaluation.panel import Panel
from slimformer.plans.plan import fingerprint
from slimformer.report import panel_table, plan_page
from tiny_checkpoints import tiny_checkpoint
from tiny_models import tiny_model

PANEL = {
    "score": 0.8,
    "spread": 0.01,
    "mean": 0.9,
    "worst": "copying",
    "budget": "quick",
    "capabilities": {
        "text": {"kept": 0.95, "spread": 0.01, "parts": {"<b>": 0.9}, "figures": {"divergence": 0.05}},
        "copying": {"kept": 0.7, "spread": 0.02, "figures": {"loss_dense": 0.1, "loss_slim": 0.4}},
    },
    "left_out": {"retrieval": "no room"},
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("models") / "llama", "llama", max_position_embeddings=512, head_dim=8
    )


@pytest.fixture
def plan(llama: str, tmp_path: Path) -> str:
    folder = tmp_path / "plan"
    drop = LayerDrop(attention=[1], mlp=[2])
    Plan([drop], fingerprint(tiny_model("llama"))).save_pretrained(folder)
    return str(folder)


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def test_eval_judges_your_prompts_and_show_draws_what_was_kept(llama: str, plan: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("one and two\n\nthree and four\n\nfive")
    arguments = ("eval", llama, "--plan", plan, "--blocks", 2, "--sequence-length", 32, "--panel", "quick")
    result = run(*arguments, "--prompts", file, "--words", tmp_path / "words", "--save")
    for name in ("text", "yours", "score: mean and worst", "Perplexity"):
        assert name in result.stdout
    kept = Plan.from_pretrained(plan).measured["panel"]
    assert set(kept["capabilities"]) >= {"text", "yours"}
    assert 0 < kept["score"] < 1
    assert kept["yours"]["prompts"] == 3
    assert len(list((tmp_path / "words").iterdir())) >= 1
    shown = run("show", plan, "--html", tmp_path / "plan.html").stdout
    assert "the part of dense's that is kept" in shown
    assert "Capabilities, beside the dense model" in (tmp_path / "plan.html").read_text(encoding="utf-8")


def test_an_interrupted_eval_keeps_what_it_had_measured(
    llama: str, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Panel, "recorded", interrupt)
    arguments = ("eval", llama, "--plan", plan, "--blocks", 2, "--sequence-length", 32)
    assert "interrupted" in run(*arguments, "--save", code=130).stderr
    assert list(Plan.from_pretrained(plan).measured) == ["quality"]


def test_prompts_and_tasks_that_cannot_be_judged_are_refused(llama: str, plan: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    asked = ("eval", llama, "--plan", plan, "--prompts", file, "--prompts-by", "match")
    assert "Exact match compares what is written" in run(*asked, code=1).stderr
    arguments = ("eval", llama, "--plan", plan, "--blocks", 2, "--panel", "none", "--tasks", "no_such_task")
    message = run(*arguments, code=1).stderr
    assert ("no_such_task" if importlib.util.find_spec("lm_eval") else "slimformer[eval]") in message


def test_eval_judges_embeddings_by_their_neighbours_and_your_collection(tmp_path: Path) -> None:
    pipeline(tmp_path / "model").save(str(tmp_path / "saved"))
    Plan([LayerDrop(block=[2])]).save_pretrained(tmp_path / "plan")
    asked = ("eval", tmp_path / "saved", "--plan", tmp_path / "plan", "--panel", "quick")
    figures = json.loads(run(*asked, "--task", beir(tmp_path / "beir"), "--json").stdout)
    assert list(figures["panel"]["capabilities"]) == ["neighbours", "similarities", "yours"]
    yours = figures["panel"]["capabilities"]["yours"]["figures"]
    assert yours["task_slim"] == pytest.approx(figures["slim"]["nDCG@10"], abs=1e-6)
    alone = json.loads(run(*asked, "--json").stdout)
    assert 0 < alone["panel"]["score"] < 1


def test_the_table_and_the_page_show_what_a_stored_panel_holds() -> None:
    table = panel_table({"panel": PANEL})
    assert table.row_count == 4
    assert "Retrieval left out: no room" in str(table.caption)
    page = plan_page(Plan([LayerDrop(attention=[1])], measured={"panel": PANEL}))
    assert page.count('class="bar attention"') == 2 + 1  # with the key
    assert "&lt;b&gt;" in page
    assert "<b>&" not in page.split("By kind")[1]
    assert "KL to dense 0.05 nats per token" not in plan_page(Plan([LayerDrop(attention=[1])]))


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"panel": 3},
        {"panel": {"capabilities": {"text": "good", "own words": {"kept": "much"}, "x": {"kept": math.nan}}}},
        {"panel": {"capabilities": [1], "left_out": 2, "score": None}},
    ],
)
def test_a_stored_panel_of_another_shape_shows_nothing(stored: dict[str, object]) -> None:
    assert panel_table(stored).row_count == 0
    assert "Capabilities" not in plan_page(Plan([LayerDrop(attention=[1])], measured=stored))

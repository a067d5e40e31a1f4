"""`slimformer demo`: a plan and its page, or a word on what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from command_line import refused, run
from slimformer import Plan
from slimformer.cli.commands.demo_models import demo_embedder, demo_model
from slimformer.errors import SlimformerError
from slimformer.plans.plan import FILE


def test_demo_reads_long_prompts_with_a_given_model(llama: str, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    arguments = ("demo", llama, "-o", folder, "--prompts", 1)
    result = run(*arguments)
    for expected in ("Perplexity", "Facts recalled", "Prefill", "KV cache"):
        assert expected in result.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "plan.html", FILE]
    plan = Plan.from_pretrained(folder)
    (method,) = plan.methods
    assert method.schedule == {3: 0.2}
    speed = plan.measured["speed"]
    assert speed["slim"]["cache_bytes"] < speed["dense"]["cache_bytes"]
    assert "--force" in refused(*arguments)
    document = json.loads(run(*arguments, "--force", "--json").stdout)
    assert document["plan"]["measured"]["quality"] == plan.measured["quality"]
    assert document["batch"]["difference"] < 1e-5
    assert plan.measured["quality"]["facts_recalled_slim"] in ("0 of 1", "1 of 1")


def test_demo_refuses_what_predicts_no_tokens(bert: str, tmp_path: Path) -> None:
    assert "predicts no tokens" in refused("demo", bert, "-o", tmp_path / "demo")


def test_without_a_connection_the_demo_asks_for_a_model_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SlimformerError, match="slimformer demo MODEL"):
        demo_model(tmp_path)
    with pytest.raises(SlimformerError, match="slimformer demo MODEL"):
        demo_embedder(tmp_path)
    assert list(tmp_path.iterdir()) == []

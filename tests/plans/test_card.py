"""A plan's card says what the plan does, and what somebody wrote into it stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from slimformer import EarlyExit, LayerDrop, Plan, TokenElimination
from slimformer.errors import PlanError, SlimformerWarning
from slimformer.methods.weight_delta import WeightDelta
from slimformer.plans.base_model import CARD, in_folder
from slimformer.plans.card import plan_name
from slimformer.plans.plan import FILE, WEIGHTS

BASE = {"id": "org/Tiny-1B", "name": "Tiny-1B", "revision": "a" * 40, "license": "mit"}
PROVENANCE = {"base_model": {**BASE, "pipeline_tag": "text-generation"}, "data": "file texts.txt, 12 texts"}
MEASURED: dict[str, Any] = {
    "panel": {"score": 0.931, "spread": 0.012, "capabilities": {"own words": {"kept": 0.95, "spread": 0.02}}},
    "quality": {"divergence": 0.0312, "data": "WikiText-2"},
    "tasks": {"dense": {"PIQA": 0.643}, "slim": {"PIQA": 0.631}, "standard_error": {"PIQA": 0.011}},
    "speed": {
        "device": "cpu, 2 threads",
        "prompt_tokens": 512,
        "dense": {"prefill_seconds": 1.2, "prefill_p20": 1.1, "prefill_p80": 1.3},
        "slim": {"prefill_seconds": 0.8, "prefill_p20": 0.7, "prefill_p80": 0.9},
    },
}
DROP = LayerDrop(attention=[21, 24], block=[3])


def plan(*methods: Any) -> Plan:
    return Plan(methods or (DROP,), {"layers": 30}, PROVENANCE, MEASURED)


def test_a_card_says_what_the_plan_drops_keeps_and_comes_from(tmp_path: Path) -> None:
    plan().save_pretrained(tmp_path / "mine")
    card = ModelCard.load(tmp_path / "mine" / CARD)
    assert card.data.to_dict() == {
        "library_name": "slimformer",
        "base_model": "org/Tiny-1B",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["slimformer", "layer-drop", "pruned"],
    }
    for said in (
        "- 1 whole layers: 3\n- 2 attentions: 21, 24\n- of 30 layers",
        "| own words | 95.0% | 2.0 |",
        "| score: mean and worst | 93.1% | 1.2 |",
        "| KL to dense, nats per token | 0.0312 |",
        "| PIQA | 0.643 | 0.631 | 0.011 |",
        "| prompt, ms | 1.2e+03 (1.1e+03 to 1.3e+03) | 800 (700 to 900) | 1.50× |",
        "- base model: org/Tiny-1B",
        f"- its revision: {'a' * 40}",
        "- its licence: mit",
        "- chosen by: file texts.txt, 12 texts",
        'slimformer.patch(model, "mine")',
        "slimformer export org/Tiny-1B --plan mine -o slim --to vllm",
        "slimformer export org/Tiny-1B --plan mine -o slim --to gguf",
    ):
        assert said in card.text
    # An attention alone is no ordinary checkpoint.
    assert "--to checkpoint" not in card.text


def test_engines_are_named_that_can_hold_the_plan(tmp_path: Path) -> None:
    plan(TokenElimination({3: 0.5})).save_pretrained(tmp_path / "dynamic")
    assert "--to" not in (tmp_path / "dynamic" / CARD).read_text()
    encoder = Plan(
        [LayerDrop(block=[1])], provenance={"base_model": {**BASE, "pipeline_tag": "feature-extraction"}}
    )
    encoder.save_pretrained(tmp_path / "encoder")
    text = (tmp_path / "encoder" / CARD).read_text()
    assert "--to onnx --quantize int8" in text
    assert "--to checkpoint" in text
    assert "vllm" not in text


def test_a_plan_of_an_unknown_model_says_what_it_knows(tmp_path: Path) -> None:
    Plan([EarlyExit(layer=3)]).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.to_dict() == {"library_name": "slimformer", "tags": ["slimformer", "early-exit"]}
    assert "None" not in str(card)


def test_what_somebody_wrote_around_the_marks_stays(tmp_path: Path) -> None:
    plan().save_pretrained(tmp_path)
    written = (tmp_path / CARD).read_text()
    own = written.replace("license: mit", "license: apache-2.0").replace(
        "- slimformer\n", "- slimformer\n- mine\n"
    )
    head, _, body = own.partition("\n\n")
    (tmp_path / CARD).write_text(f"{head}\n\n# My own title\n\n{body}\nAsk me anything.\n")
    Plan([LayerDrop(attention=[5])], {"layers": 30}, PROVENANCE).save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / CARD)
    assert "# My own title" in card.text
    assert "Ask me anything." in card.text
    assert "- 1 attentions: 5" in card.text
    assert "21, 24" not in card.text
    assert card.data.license == "apache-2.0"
    assert card.data.tags == ["slimformer", "mine", "layer-drop", "pruned"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda text: text.replace("2 attentions", "two attentions"), "was edited between"),
        (lambda text: "# Somebody's card\n", "not one that slimformer wrote"),
        (lambda text: "---\n: [\n---\n" + text, "not one that slimformer wrote"),
    ],
    ids=["inside", "another", "damaged"],
)
def test_a_card_that_somebody_edited_is_not_overwritten(edit: Any, said: str, tmp_path: Path) -> None:
    plan().save_pretrained(tmp_path)
    edited = edit((tmp_path / CARD).read_text())
    (tmp_path / CARD).write_text(edited)
    with pytest.warns(SlimformerWarning, match=said):
        plan(LayerDrop(attention=[5])).save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_text() == edited
    assert Plan.from_pretrained(tmp_path).methods == (LayerDrop(attention=[5]),)


def test_saving_twice_changes_nothing_in_the_card(tmp_path: Path) -> None:
    plan().save_pretrained(tmp_path)
    first = (tmp_path / CARD).read_bytes()
    plan().save_pretrained(tmp_path)
    assert (tmp_path / CARD).read_bytes() == first


def test_values_from_elsewhere_are_text_in_a_card(tmp_path: Path) -> None:
    nasty = {"data": "a | b\n# Title <script>`x`", "base_model": {"name": 'x"); import os; ("'}}
    Plan([LayerDrop(block=[1])], provenance=nasty).save_pretrained(tmp_path)
    text = (tmp_path / CARD).read_text()
    assert "<script>" not in text
    assert "\n# Title" not in text
    assert 'x")' not in text


@pytest.mark.parametrize(
    ("methods", "name"),
    [
        ([LayerDrop(attention=range(8))], "Tiny-1B-slim-attn8"),
        ([LayerDrop(block=[1, 2], mlp=[5])], "Tiny-1B-slim-block2-mlp1"),
        (
            [LayerDrop(attention=[2], mlp=[2]), TokenElimination({3: 0.5})],
            "Tiny-1B-slim-block1-token-elimination",
        ),
        ([TokenElimination({3: 0.5})], "Tiny-1B-slim-token-elimination"),
    ],
)
def test_names_say_the_model_and_what_is_gone(methods: list[Any], name: str) -> None:
    assert plan_name("org/Tiny-1B", Plan(methods)) == name


def test_a_plan_that_knows_no_model_has_to_be_given_a_name() -> None:
    with pytest.raises(PlanError, match="which model it was made for"):
        Plan([DROP]).push_to_hub()


def test_a_checkpoint_says_its_name_revision_and_licence(tmp_path: Path) -> None:
    folder = tmp_path / "models--org--Tiny-1B" / "snapshots" / ("b" * 40)
    folder.mkdir(parents=True)
    (folder / CARD).write_text("---\nlicense: mit\ntags:\n- text\n---\nA model.\n")
    assert in_folder(folder) == {
        "name": "Tiny-1B",
        "id": "org/Tiny-1B",
        "revision": "b" * 40,
        "license": "mit",
    }
    (tmp_path / "own").mkdir()
    assert in_folder(tmp_path / "own") == {"name": "own"}


def in_the_cache(name: str, cache: Path, files: dict[str, bytes]) -> None:
    """A repository as the Hub's client keeps it, of which only some files were downloaded."""
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs/main").write_text("c" * 40)
    for file, content in files.items():
        (snapshot / file).write_bytes(content)


def show(cache: Path, *arguments: str) -> str:
    """What the command prints where only the cache can be asked, which is settled when a process begins."""
    own = {"HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    command = [sys.executable, "-m", "slimformer", "show", *arguments]
    return subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True).stdout


def test_show_reads_a_plan_of_the_hub_without_its_weights(tmp_path: Path) -> None:
    name = "2.self_attn.q_proj.weight"
    delta = WeightDelta({f"{name}.left": torch.ones(8, 2), f"{name}.right": torch.ones(2, 8)})
    plan(DROP, delta).save_pretrained(tmp_path / "mine")
    assert (tmp_path / "mine" / WEIGHTS).is_file()
    in_the_cache("me/mine", tmp_path / "hub", {FILE: (tmp_path / "mine" / FILE).read_bytes()})
    shown = show(tmp_path / "hub", "me/mine")
    assert "attention 21" in shown
    assert "93.1%" in shown


def test_show_prints_the_card_of_an_exported_model(tmp_path: Path) -> None:
    plan().save_pretrained(tmp_path / "mine")
    in_the_cache("me/exported", tmp_path / "hub", {CARD: (tmp_path / "mine" / CARD).read_bytes()})
    in_the_cache("me/other", tmp_path / "hub", {CARD: b"# A model\n"})
    assert "own words" in show(tmp_path / "hub", "me/exported")
    assert show(tmp_path / "hub", "me/other") == ""


def test_weights_that_were_not_read_compute_nothing(tmp_path: Path) -> None:
    weights = {"attention.1.bias": torch.ones(8)}
    Plan([LayerDrop(attention=[1], replace="mean", weights=weights)]).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    found = Plan.from_pretrained(tmp_path, weights=False)
    assert found.methods[0].tensors()["attention.1.bias"].is_meta
    with pytest.raises(PlanError, match=r"slimformer\.safetensors"):
        Plan.from_pretrained(tmp_path)

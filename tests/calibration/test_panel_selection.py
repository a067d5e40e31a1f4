"""Drops chosen by several sources: what the model writes, text, and sequences that repeat."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tests.training.test_training import TEXTS

import slimformer
from slimformer import LayerDrop
from slimformer.calibration.drops.search import Search
from slimformer.errors import CalibrationError, DataError
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

SOURCES = {"own-words", "texts", "copying"}


def strong(name: str = "llama") -> torch.nn.Module:
    """Weights large enough that every sublayer matters."""
    return tiny_model(name, initializer_range=0.3, num_hidden_layers=5)


def search(shares: dict[str, float]) -> Search:
    found: Search = object.__new__(Search)
    found.shares = shares
    return found


def test_decoders_are_chosen_by_every_source_and_each_removal_says_what_it_costs() -> None:
    plan = slimformer.calibrate(strong(), tiny_tokenizer(), LayerDrop, data=TEXTS, drop=2)
    assert plan.provenance["arguments"]["selection"] == "panel"
    for step in plan.provenance["steps"]:
        assert set(step["sources"]) == SOURCES
        assert step["divergence"] == max(step["sources"].values()) > 0
    assert "the dense model" in plan.provenance["data"]


def test_the_first_removal_is_the_one_of_which_most_is_kept(tmp_path: Path) -> None:
    plan = slimformer.calibrate(
        strong(), tiny_tokenizer(), LayerDrop, data=TEXTS, drop=1, budget="standard", checkpoint=tmp_path
    )
    alone = json.loads((tmp_path / "calibration.json").read_text())["singles"]
    by = search({"own-words": 0.6, "texts": 0.3, "copying": 0.1})
    best = min(alone, key=lambda one: by.loss(one["sources"]))
    (step,) = plan.provenance["steps"]
    assert len(alone) == 5
    assert (step["kind"], step["layer"], step["sources"]) == (best["kind"], best["layer"], best["sources"])


@pytest.mark.parametrize(
    ("divergences", "expected"),
    [
        ({"text": 0.7}, 0.7),
        ({"own-words": 0.0, "text": 0.0}, 0.0),
        # Of own words all is kept, of text half: the mean is 0.875, the worst 0.5.
        ({"own-words": 0.0, "text": math.log(2)}, 1 - (0.875 + 0.5) / 2),
        # What is lost of the other counts more, since it has the larger share.
        ({"own-words": math.log(2), "text": 0.0}, 1 - (0.625 + 0.5) / 2),
    ],
)
def test_the_loss_is_what_the_score_of_a_panel_lacks(divergences: dict[str, float], expected: float) -> None:
    assert search({"own-words": 0.75, "text": 0.25}).loss(divergences) == pytest.approx(expected)


def test_sources_and_their_weights_are_the_users() -> None:
    model, tokenizer = strong(), tiny_tokenizer()
    data = {"built-in": 3.0, "copying": 1.0}
    plan = slimformer.calibrate(model, tokenizer, LayerDrop, data=data, drop=1)
    assert set(plan.provenance["steps"][0]["sources"]) == {"built-in", "copying"}


def test_partial_results_hold_what_every_candidate_costs_alone(tmp_path: Path) -> None:
    model, tokenizer = strong(), tiny_tokenizer()
    options = {"data": TEXTS, "budget": "quick", "checkpoint": tmp_path}
    first = slimformer.calibrate(model, tokenizer, LayerDrop, drop=1, **options)
    again = slimformer.calibrate(model, tokenizer, LayerDrop, drop=1, **options)
    assert first.methods == again.methods
    assert first.provenance["steps"] == again.provenance["steps"]
    assert any(tmp_path.glob("written-*.json"))


def test_what_cannot_be_chosen_so_is_refused() -> None:
    model, tokenizer = strong(), tiny_tokenizer()
    with pytest.raises(CalibrationError, match="Several sources are for selection='panel'"):
        slimformer.calibrate(model, tokenizer, LayerDrop, data={"built-in": 1.0}, selection="greedy", drop=1)
    with pytest.raises(CalibrationError, match="selection must be one of greedy, cosine"):
        slimformer.calibrate(tiny_model("bert"), tokenizer, LayerDrop, data=TEXTS, selection="panel", drop=1)
    with pytest.raises(DataError, match="has no source"):
        slimformer.calibrate(model, tokenizer, LayerDrop, data={}, drop=1)
    with pytest.raises(DataError, match="weight of 'built-in' is 'much'"):
        slimformer.calibrate(model, tokenizer, LayerDrop, data={"built-in": "much"}, drop=1)

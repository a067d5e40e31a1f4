"""A sweep of temperatures on a task, or without labels, and what is shown of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer

import slimformer
from command_line import run
from real_models import minilm
from slimformer import Plan, TempScale
from slimformer.errors import CalibrationError, DataError, PlanError
from slimformer.evaluation.embedding_tasks import NeighbourTask, PairTask
from slimformer.evaluation.length_spread import LengthSpread
from slimformer.model.anatomy import transformer_of
from slimformer.report import plan_page, temperature_table
from tiny_checkpoints import tiny_checkpoint

WORDS = ("river", "music", "engine", "paper", "winter", "doctor", "silver", "garden", "market", "letter")


def sentences(count: int, words: int, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=words)) for _ in range(count)]


@pytest.fixture
def model(tmp_path: Path) -> Any:
    return SentenceTransformer(tiny_checkpoint(tmp_path, "bert", initializer_range=0.5), device="cpu")


def pairs(count: int = 24) -> PairTask:
    texts, chance = sentences(2 * count, 8), random.Random(1)
    return PairTask(
        "pairs", list(zip(texts[::2], texts[1::2], strict=True)), [chance.random() for _ in range(count)]
    )


def test_the_best_temperature_of_a_task_is_the_plan(model: Any) -> None:
    task, taus = pairs(), (0.2, 0.5, 2.0)
    plan = slimformer.calibrate(model, None, TempScale, data=task, temperatures=taus, hold_out=False)
    curve = plan.provenance["temperature"]
    assert curve["tau"] == [2.0, 1.0, 0.5, 0.2]
    for tau, score in zip(curve["tau"], curve["scores"], strict=True):
        with slimformer.patched(model, TempScale(tau)):
            assert task.scores(model) == [pytest.approx(score)]
    assert len(set(curve["scores"])) > 1
    assert list(plan.methods) == [TempScale(curve["tau"][curve["scores"].index(max(curve["scores"]))])]
    assert not slimformer.status(model)


def test_only_a_part_of_the_task_is_looked_at(model: Any) -> None:
    plan = slimformer.calibrate(model, None, TempScale, data=pairs(), temperatures=[0.5])
    assert plan.provenance["data"] == "pairs, every other pair"


def test_spread_is_the_mean_distance_between_texts_of_a_length(model: Any) -> None:
    task = LengthSpread("words", sentences(40, 16))
    limit = model.max_seq_length = 32
    found = task.spreads(model)
    assert list(found) == [16, 32]
    assert model.max_seq_length == limit
    joined = task._joined(model.tokenizer, 32)
    for length, spread in found.items():
        model.max_seq_length = length
        unit = torch.nn.functional.normalize(torch.tensor(model.encode(joined)), dim=-1)
        apart = [1 - float(a @ b) for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j]
        assert spread == pytest.approx(sum(apart) / len(apart), abs=1e-5)


def test_without_labels_the_mildest_that_keeps_the_spread_is_taken(model: Any) -> None:
    model.max_seq_length = 32
    plan = slimformer.calibrate(
        model, None, TempScale, data=NeighbourTask("words", sentences(60, 16)), temperatures=[0.3, 0.6]
    )
    curve = plan.provenance["temperature"]
    assert curve["lengths"] == [16, 32]
    figures = [min(long / short, 1.0) for short, long in curve["spread"]]
    assert curve["scores"] == pytest.approx(figures)
    best = [
        tau for tau, score in zip(curve["tau"], curve["scores"], strict=True) if score == max(curve["scores"])
    ]
    assert list(plan.methods) == [TempScale(max(best))]


def test_a_real_model_is_swept_and_left_as_it_was() -> None:
    model = SentenceTransformer(str(minilm()), device="cpu")
    texts = sentences(6, 12)
    before = model.encode(texts)
    plan = slimformer.calibrate(model, None, TempScale, data=pairs(8), temperatures=[0.8], hold_out=False)
    assert (model.encode(texts) == before).all()
    slimformer.patch(model, TempScale(0.8))
    assert abs(model.encode(texts) - before).max() > 1e-3
    assert plan.provenance["temperature"]["tau"] == [1.0, 0.8]


def test_what_cannot_be_swept_is_refused(model: Any) -> None:
    with pytest.raises(PlanError, match="takes a number above 0, got 0"):
        slimformer.calibrate(model, None, TempScale, data=pairs(), temperatures=[0])
    with pytest.raises(DataError, match="fills 1 texts of 128 tokens, and 8 are needed"):
        slimformer.calibrate(model, None, TempScale, data=NeighbourTask("words", sentences(10, 4)))
    with pytest.raises(CalibrationError, match="Call unpatch first"):
        slimformer.calibrate(slimformer.patch(model), None, TempScale, data=pairs())
    with pytest.raises(CalibrationError, match="measured with a SentenceTransformer, got BertModel"):
        slimformer.calibrate(
            transformer_of(slimformer.unpatch(model)),
            None,
            TempScale,
            data=NeighbourTask("words", sentences(10, 4)),
        )


def test_the_command_sweeps_and_shows(tmp_path: Path) -> None:
    folder, out, data = tmp_path / "model", tmp_path / "plan", tmp_path / "pairs.tsv"
    tiny_checkpoint(folder, "bert")
    rows = [
        f"{gold}\t{first}\t{second}"
        for gold, (first, second) in zip(pairs().gold, pairs().pairs, strict=True)
    ]
    data.write_text("\n".join(["score\tsentence1\tsentence2", *rows]))
    done = run("calibrate", "temperature", folder, "-o", out, "--data", data)
    assert "chosen" in done.stdout
    plan = Plan.from_pretrained(out)
    assert isinstance(plan.methods[0], TempScale)
    shown = run("show", out, "--html", tmp_path / "plan.html", "--json")
    assert json.loads(shown.stdout)["provenance"]["temperature"]["tau"] == [1.0, 0.95, 0.9, 0.85, 0.8, 0.7]
    assert "<h2>Temperature</h2>" in (tmp_path / "plan.html").read_text()


def test_a_sweep_is_shown_in_a_table_and_on_the_page(tmp_path: Path) -> None:
    curve = {"name": "a <figure>", "tau": [1.0, 0.9], "scores": [0.25, 0.5]}
    plan = Plan([TempScale(0.9)], provenance={"temperature": curve, "data": "words"})
    plan.save_pretrained(tmp_path)
    plan = Plan.from_pretrained(tmp_path)
    table, page = temperature_table(plan), plan_page(plan)
    assert table is not None
    assert table.row_count == 2
    assert "a &lt;figure&gt; against the temperature" in page
    assert '<circle class="dot total"' in page
    assert "chosen by words" in str(table.caption)
    spread = curve | {"lengths": [16, 32], "spread": [[0.5, 0.4], [0.5, 0.45]]}
    assert "τ = 0.9" in plan_page(Plan([TempScale(0.9)], provenance={"temperature": spread}))
    for broken in (
        {"tau": [1.0]},
        {"tau": [1.0], "scores": ["x"]},
        [],
        {"tau": [1.0], "scores": [float("nan")]},
    ):
        other = Plan([TempScale(0.9)], provenance={"temperature": broken})
        assert temperature_table(other) is None
        assert "<h2>Temperature</h2>" not in plan_page(other)

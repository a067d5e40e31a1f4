"""Embedding models: narrow MLPs and exits beside drops, judged by neighbours or by what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from tests.optimization.conftest import strong

import slimformer
from embedding_data import TEXTS, beir
from slimformer import EarlyExit, NarrowMlp
from slimformer.errors import CalibrationError
from slimformer.evaluation.embedding_tasks import read_task
from slimformer.optimization.measuring.bases import encoder_options
from slimformer.optimization.units import droppable
from slimformer.report import optimize_table, plan_page
from tiny_checkpoints import tiny_tokenizer


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("bert")
    strong("bert").save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(folder)
    return SentenceTransformer(
        modules=[Transformer(str(folder)), Pooling(32, pooling_mode="mean")], device="cpu"
    )


def test_exits_and_narrow_mlps_are_what_drops_are_made_from(pipeline: Any) -> None:
    found = slimformer.support(pipeline)
    units = droppable(pipeline, found)
    options = list(encoder_options(pipeline, found, units, TEXTS, [], most=50))
    kinds = [type(option.methods[0]) for option in options]
    assert kinds.count(NarrowMlp) == 4
    assert EarlyExit in kinds
    for option in options:
        if isinstance(option.methods[0], NarrowMlp):
            # A narrow MLP stands where the whole one did, so that none can go as well.
            assert option.whole == {unit for unit in units if unit[0] == "mlp"}
        else:
            layer = option.methods[0].layer
            assert option.whole == {unit for unit in units if unit[1] >= layer}


def test_embeddings_are_judged_by_what_they_are_for_where_that_is_given(
    pipeline: Any, tmp_path: Path
) -> None:
    task = read_task(beir(tmp_path / "task"))
    plan = slimformer.optimize(
        pipeline, goal="encode", max_loss=0.9, data=task, minutes=4, batch=4, repair=False
    )
    found = plan.measured["optimize"]
    assert found["goal"] == "encode"
    assert all("yours" in entry["lost"] for entry in found["candidates"])
    for entry in found["candidates"]:
        assert entry["mean_lost"] == entry["lost"]["yours"]
    assert not slimformer.status(pipeline)
    assert optimize_table(plan).row_count == len(found["candidates"])
    assert "What was tried, and what was chosen" in plan_page(plan)


def test_an_encoder_without_pooling_is_judged_by_its_neighbours() -> None:
    plan = slimformer.optimize(
        strong("bert"), tiny_tokenizer(), goal="encode", max_loss=0.9, data=TEXTS * 3, minutes=4, repair=False
    )
    names = set(plan.measured["optimize"]["candidates"][-1]["lost"])
    assert names == {"neighbours", "similarities"}


def test_prompts_are_not_for_embeddings(pipeline: Any) -> None:
    with pytest.raises(CalibrationError, match="Prompts are for models that predict tokens"):
        slimformer.optimize(pipeline, goal="encode", prompts="mine.jsonl")

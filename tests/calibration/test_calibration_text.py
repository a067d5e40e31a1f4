"""What calibration reads is what the model can read, and it says where that is too little to choose by."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModel, PreTrainedModel

import slimformer
from slimformer import LayerDrop, TokenElimination
from slimformer.calibration.drops.budgets import BUDGETS
from slimformer.calibration.drops.calibration_text import read_text
from slimformer.errors import DataError, SlimformerWarning
from slimformer.evaluation.quality import measure_quality
from slimformer.evaluation.readable import longest
from slimformer.model.anatomy import find_anatomy
from slimformer.training.loop import TrainingSettings
from slimformer.training.routing.arank import calibrate_arank
from tiny_checkpoints import tiny_tokenizer
from tiny_models import COMMON, tiny_model

TEXTS = [f"A text of number {'abcdefghij'[i % 10]} says a little about nothing much." * 9 for i in range(200)]


def foreign() -> Any:
    """A tokenizer whose ids go beyond a tiny model's 64."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([*(f"w{i}" for i in range(9)), "nothing much"])
    tokenizer.model_max_length = 512
    return tokenizer


@pytest.mark.parametrize("call", [
    lambda model, **given: slimformer.calibrate(model, method=LayerDrop, drop=1, **given),
    lambda model, **given: calibrate_arank(model, number=1, **given),
    lambda model, **given: slimformer.calibrate(
        model, method=TokenElimination(least=64), max_loss=1.0, length=240, answer=8, **given
    ),
    lambda model, **given: slimformer.repair(
        model, slimformer.Plan([slimformer.LayerDrop(mlp=[1])]), what=("norms",), length=32,
        settings=TrainingSettings(steps=1, rows=1), **given),
], ids=["drop", "arank", "elimination", "repair"])  # fmt: skip
def test_ids_that_the_model_has_no_embedding_for_are_refused(call: Any) -> None:
    with pytest.raises(
        DataError, match=r"ids from .* and the model knows 0 to 63\. Use the model's own tokenizer"
    ):
        call(
            tiny_model("llama", num_hidden_layers=6, max_position_embeddings=512),
            tokenizer=foreign(),
            data=TEXTS,
        )


def test_an_encoder_is_refused_such_ids_too() -> None:
    with pytest.raises(DataError, match="the model knows 0 to 63"):
        slimformer.calibrate(tiny_model("bert"), foreign(), LayerDrop, data=TEXTS, drop=1)
    batch = {"input_ids": torch.tensor([[1, 64]])}
    with pytest.raises(DataError, match="ids from 1 to 64, and the model knows 0 to 63"):
        measure_quality(tiny_model("bert"), slimformer.LayerDrop(mlp=[1]), batches=batch)


def roberta_like(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**COMMON, "max_position_embeddings": 50, "pad_token_id": 1})
    return AutoModel.from_config(config).eval()


@pytest.mark.parametrize("name", ["roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet", "bert"])
def test_texts_are_cut_to_the_positions_a_model_has_whatever_its_tokenizer_says(name: str) -> None:
    model, tokenizer = roberta_like(name), tiny_tokenizer()
    tokenizer.model_max_length = int(1e30)
    length = longest(find_anatomy(model), tokenizer)
    assert length == (50 if name == "bert" else 48)
    ids = torch.full((1, length), 7)
    with torch.no_grad():
        assert model(ids).last_hidden_state.isfinite().all()
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, length + 1), 7))
    assert slimformer.calibrate(model, tokenizer, LayerDrop, data=TEXTS, drop=1).drops


def test_blocks_begin_as_the_tokenizer_begins_texts_and_no_iterator_is_read_to_its_end() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    read: list[int] = []
    endless = (read.append(i) or TEXTS[i % 200] for i in itertools.count())
    text = read_text(model, find_anatomy(model), tokenizer, endless, "text", True, BUDGETS["quick"], 0)
    assert text.rows["input_ids"].shape == (36, 128)
    assert (text.rows["input_ids"][:, 0] == 1).all()
    assert len(read) < 10_000
    assert slimformer.calibrate(model, tokenizer, LayerDrop, data=itertools.cycle(TEXTS), drop=1).drops


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_too_few_texts_to_choose_by_are_said_with_how_many_would_do(name: str) -> None:
    model = tiny_model(name)
    with pytest.warns(
        SlimformerWarning, match="gives 3 blocks .* Give 12 times as much text: .* reads 36 blocks"
    ):
        slimformer.calibrate(
            model,
            tiny_tokenizer(),
            LayerDrop,
            data=TEXTS[:3] if name == "bert" else ["abc" * 129],
            selection="greedy",
            drop=1,
            hold_out=False,
        )
    with pytest.raises(DataError, match="at least two blocks"):
        slimformer.calibrate(
            model,
            tiny_tokenizer(),
            LayerDrop,
            data=["abc" * 50],
            selection="greedy",
            drop=1,
            hold_out=False,
        )


def test_a_source_that_is_too_short_to_choose_by_is_named() -> None:
    with pytest.warns(SlimformerWarning, match="texts gives 1 blocks .* Give 2 times as much"):
        slimformer.calibrate(
            tiny_model("llama"), tiny_tokenizer(), LayerDrop, data=["abc" * 50], drop=1, hold_out=False
        )

"""What the demo measures is what happens: likelihoods behind a prompt, facts told, the same embeddings sooner."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer

import slimformer
from slimformer import LayerDrop
from slimformer.errors import CalibrationError, DataError
from slimformer.evaluation.timing.arrivals import measure_arrivals
from slimformer.evaluation.timing.long_prompts import _fact, _run, _summary, _Trial, measure_long_prompts
from slimformer.evaluation.timing.padded_prompts import measure_padded_prompts
from slimformer.methods.elimination.random_keep import RandomKeep
from slimformer.text.sources import load_texts, token_blocks
from tiny_checkpoints import tiny_checkpoint, tiny_tokenizer
from tiny_models import tiny_model

TEXTS = load_texts(None, limit=20)[0]


def test_the_loss_is_that_of_the_text_behind_the_prompt() -> None:
    model = tiny_model("llama")
    sizes = {"prompt_tokens": 96, "answer_tokens": 12, "count": 2, "seed": 3}
    found = measure_long_prompts(model, tiny_tokenizer(), LayerDrop(attention=[1]), texts=TEXTS, **sizes)
    blocks = token_blocks(TEXTS, tiny_tokenizer(), sequence_length=108, count=4, seed=3)[::2]

    def loss() -> float:
        with torch.no_grad():
            logits = model(blocks).logits[:, 95:-1]
        return float(F.cross_entropy(logits.flatten(0, 1), blocks[:, 96:].flatten()))

    assert found.dense.loss == pytest.approx(loss(), abs=1e-5)
    with slimformer.patched(model, LayerDrop(attention=[1])):
        assert found.slim.loss == pytest.approx(loss(), abs=1e-5)
    assert found.slim.cache_bytes * 4 == found.dense.cache_bytes * 3
    assert (found.prompts, found.prompt_tokens) == (4, 96)
    assert slimformer.status(model) == {}


def test_nothing_left_out_changes_nothing() -> None:
    model = tiny_model("llama")
    found = measure_long_prompts(
        model, tiny_tokenizer(), RandomKeep(1.0), texts=TEXTS, prompt_tokens=96, count=1
    )
    assert found.slim.loss == pytest.approx(found.dense.loss, abs=1e-5)
    assert found.slim.recalled == found.dense.recalled


def test_a_fact_stands_at_its_place_and_is_asked_for_at_the_end() -> None:
    tokenizer, block = tiny_tokenizer(), torch.full((160,), 5)
    for place in (0.0, 0.5):
        trial = _fact(tokenizer, block, place, random.Random(1))
        assert trial.prompt.shape == (1, 160)
        text = tokenizer.decode(trial.prompt[0])
        assert text.endswith("The pass key is")
        before = text.index("The pass key is")
        assert before == 2 if place == 0 else before > 20


def test_a_fact_counts_where_every_token_of_it_is_the_likeliest() -> None:
    model = tiny_model("llama")
    prompt = torch.arange(3, 40)[None]
    told = model.generate(prompt, do_sample=False, max_new_tokens=5, eos_token_id=None)[:, 37:]
    other = told.clone()
    other[0, -1] = (told[0, -1] + 1) % 64
    with torch.no_grad():
        runs = {}
        for name, answer in (("right", told), ("wrong", other)):
            trials = [_Trial(prompt, answer, fact=True), _Trial(prompt, answer, fact=False)]
            runs[name] = _summary([_run(model, trial) for trial in trials], trials).recalled
    assert runs == {"right": 1.0, "wrong": 0.0}


def test_long_prompts_refuse_what_they_cannot_measure() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(DataError, match="count must be at least 1, got 0"):
        measure_long_prompts(model, tokenizer, LayerDrop(mlp=[1]), texts=TEXTS, count=0)
    with pytest.raises(DataError, match="ask for shorter or fewer prompts"):
        measure_long_prompts(model, tokenizer, LayerDrop(mlp=[1]), texts=["a" * 200], prompt_tokens=96)
    with slimformer.patched(model, LayerDrop(mlp=[1])), pytest.raises(CalibrationError, match="patched"):
        measure_long_prompts(model, tokenizer, LayerDrop(mlp=[1]), texts=TEXTS, prompt_tokens=96)


def test_a_padded_batch_gives_the_logits_of_every_prompt_alone() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    found = measure_padded_prompts(model, tokenizer, texts=TEXTS, longest=40, count=4)
    assert (found.prompts, found.longest) == (4, 40)
    assert found.difference < 1e-5
    assert found.speedup == found.dense_seconds / found.patched_seconds > 0
    assert slimformer.status(model) == {}
    with pytest.raises(DataError, match="Give more text"):
        measure_padded_prompts(model, tokenizer, texts=["a" * 50], longest=40)


def test_texts_that_arrive_in_batches_keep_their_embeddings(tmp_path: Path) -> None:
    modules = [Transformer(tiny_checkpoint(tmp_path, "bert")), Pooling(32)]
    model = SentenceTransformer(modules=modules, device="cpu")
    texts = ["a", "of many more words than that", "the end of it", "b and c"] * 3
    found = measure_arrivals(model, texts, batch_size=5, repeats=1)
    assert (found.texts, found.batch_size) == (12, 5)
    assert found.lowest_cosine > 1 - 1e-5
    assert found.speedup == found.patched_per_second / found.dense_per_second > 0
    assert slimformer.status(model) == {}
    with pytest.raises(DataError, match="at least 1"):
        measure_arrivals(model, [])

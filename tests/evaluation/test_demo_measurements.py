"""What the demo measures is what happens: the same logits and embeddings, sooner."""

from __future__ import annotations

from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer

import slimformer
from slimformer.errors import DataError
from slimformer.evaluation.timing.arrivals import measure_arrivals
from slimformer.evaluation.timing.padded_prompts import measure_padded_prompts
from slimformer.text.sources import load_texts
from tiny_checkpoints import tiny_checkpoint, tiny_tokenizer
from tiny_models import tiny_model

TEXTS = load_texts(None, limit=20)[0]


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

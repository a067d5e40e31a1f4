"""Vectors of a corpus are those of `encode`, whatever the batches; what makes them is in one fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Normalize
from sentence_transformers.util import quantize_embeddings
from tokenizers import normalizers

import slimformer
from embedding_data import TEXTS, pipeline
from slimformer import LayerDrop, Plan
from slimformer.corpora.embedder import Embedder, Encoding
from slimformer.corpora.precision import Precision, kept, ranges_of
from slimformer.errors import DataError, PlanError


@pytest.mark.parametrize(("name", "mode"), [("bert", "mean"), ("bert", "cls"), ("llama", "lasttoken")])
@pytest.mark.parametrize("tokens", [1, 200, 100_000])
def test_vectors_are_those_of_encode_one_text_at_a_time(
    name: str, mode: str, tokens: int, tmp_path: Path
) -> None:
    model = pipeline(tmp_path, mode, name)
    expected = np.stack([model.encode(text) for text in TEXTS])
    vectors, reasons = Embedder(lambda: model, encoding=Encoding(batch_tokens=tokens)).embed(TEXTS)
    assert reasons == {}
    assert vectors.dtype == np.float32
    assert np.abs(vectors - expected).max() < 1e-5


def test_a_plan_prompts_and_options_of_encode_are_kept(tmp_path: Path) -> None:
    model = pipeline(tmp_path, "lasttoken", "llama")
    model.prompts = {"query": "a cat ", "document": ""}
    drop = LayerDrop(attention=[1])
    with slimformer.patched(model, drop):
        expected = model.encode(TEXTS, prompt_name="query", normalize_embeddings=True, truncate_dim=8)
    encoding = Encoding("query", 8, normalize=True)
    embedder = Embedder(lambda: model, Plan([drop]), encoding)
    vectors, _ = embedder.embed(TEXTS)
    assert slimformer.status(model)[1]["attention"] == "dropped"
    assert (vectors.shape, embedder.dimension) == ((60, 8), 8)
    assert np.abs(vectors - expected).max() < 1e-5
    with pytest.raises(DataError, match=r"no prompt 'passage'. Its prompts: 'query', 'document'"):
        Embedder(lambda: model, encoding=Encoding("passage"))


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="made for another model"):
        Embedder(lambda: pipeline(tmp_path), Plan([LayerDrop(mlp=[1])], {"layers": 99}))


def test_the_same_texts_always_give_the_same_bits(tmp_path: Path) -> None:
    first, again = (
        Embedder(lambda: pipeline(tmp_path), encoding=Encoding(batch_tokens=64)) for _ in range(2)
    )
    assert np.array_equal(first.embed(TEXTS)[0], again.embed(TEXTS)[0])


def test_texts_without_a_token_or_a_finite_vector_are_named(tmp_path: Path) -> None:
    embedder = Embedder(lambda: pipeline(tmp_path))
    clean, _ = embedder.embed(["a cat", "a dog"])
    strip = embedder.model.tokenizer.backend_tokenizer
    strip.normalizer = normalizers.Replace("z", "")
    vectors, reasons = embedder.embed(["a cat", "zz", "a dog"])
    assert reasons == {1: "gives no token"}
    assert np.abs(vectors[[0, 2]] - clean).max() < 1e-5
    with torch.no_grad():
        embedder.model[0].model.embeddings.word_embeddings.weight[5] = float("nan")
    vectors, reasons = embedder.embed(["a cat", "dog", "egg"])
    # The letter b is the sixth word of the vocabulary.
    assert reasons == {}
    vectors, reasons = embedder.embed(["a cat", "bob", "egg"])
    assert reasons == {1: "the model gives no finite vector"}
    assert np.isfinite(vectors).all()
    assert embedder.embed([])[0].shape == (0, 32)


def test_a_batch_that_fits_no_memory_is_said_with_what_to_do(tmp_path: Path) -> None:
    class Full(SentenceTransformer):
        """As a GPU whose memory holds three texts."""

        def encode(self, inputs: Any, **options: Any) -> Any:
            if len(inputs) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().encode(inputs, **options)

    def load() -> SentenceTransformer:
        model = pipeline(tmp_path)
        model.__class__ = Full
        return model

    with pytest.raises(DataError, match=r"at most 4096 tokens does not fit .* \(--batch-tokens\)"):
        Embedder(load).embed(TEXTS)
    assert Embedder(load, encoding=Encoding(batch_tokens=3)).embed(TEXTS)[1] == {}


def test_whatever_changes_vectors_changes_the_fingerprint(tmp_path: Path) -> None:
    def of(model: Any, *plans: Plan) -> str:
        return Embedder(lambda: model, *plans).fingerprint

    def changed() -> SentenceTransformer:
        model = pipeline(tmp_path)
        with torch.no_grad():
            model[0].model.encoder.layer[1].output.dense.weight[3, 4] += 1e-3
        return model

    longer, prompted, normalized = (pipeline(tmp_path) for _ in range(3))
    longer.max_seq_length = 17
    prompted.prompts = {"query": "a "}
    normalized.append(Normalize())
    plain = of(pipeline(tmp_path))
    others = [
        of(pipeline(tmp_path, "cls")), of(changed()), of(longer), of(prompted), of(normalized),
        of(pipeline(tmp_path), Plan([LayerDrop(mlp=[1])])), of(pipeline(tmp_path), Plan([LayerDrop(mlp=[2])])),
        of(pipeline(tmp_path).bfloat16()),
    ]  # fmt: skip
    assert len({plain, *others}) == 9
    assert of(pipeline(tmp_path)) == plain
    # Neither where it was loaded from, nor what it embedded before.
    used = pipeline(tmp_path / "elsewhere")
    used.encode(TEXTS)
    assert of(used) == plain


def test_float16_names_vectors_that_it_cannot_hold() -> None:
    vectors = np.array([[1.0, 2.0], [1e6, 0.0]], dtype=np.float32)
    half, reasons = kept(vectors, Precision.float16, None)
    assert half.dtype == np.float16
    assert half[0].tolist() == [1.0, 2.0]
    assert reasons == {1: "has a number that float16 cannot hold"}


def test_int8_is_that_of_sentence_transformers_and_ends_at_its_ranges() -> None:
    drawn = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    parts = [np.stack([part.min(axis=0), part.max(axis=0)]) for part in (drawn[:50], drawn[50:100])]
    ranges = ranges_of(parts)
    assert np.array_equal(ranges, np.stack([drawn[:100].min(axis=0), drawn[:100].max(axis=0)]))
    found, reasons = kept(drawn, Precision.int8, ranges)
    assert (found.dtype, reasons) == (np.int8, {})
    inside = ((drawn >= ranges[0]) & (drawn <= ranges[1])).all(axis=1)
    assert np.array_equal(found[inside], quantize_embeddings(drawn[inside], "int8", ranges=ranges))
    far = np.stack([ranges[0] - 5, ranges[1] + 5])
    ends, _ = kept(far, Precision.int8, ranges)
    assert ends[0].tolist() == [-128] * 6
    # The upper end is divided by steps that are rounded.
    assert (ends[1] >= 126).all()
    # Numbers come back to within a step of what they were.
    steps = (ranges[1] - ranges[0]) / 255
    back = ranges[0] + (found[inside].astype(np.float32) + 128.5) * steps
    assert (np.abs(back - drawn[inside]) <= steps).all()

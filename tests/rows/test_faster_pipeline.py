"""What a patched pipeline does around its model gives the tensors and vectors that it gave before."""

from __future__ import annotations

import copy
import inspect
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer

import slimformer
from slimformer.model.anatomy import transformer_of
from slimformer.runtime.embedding_pipeline import BUSY_FROM_ELEMENTS, FillingBatches
from tiny_checkpoints import tiny_checkpoint

TEXTS = ["a cat", "", "a cat sat on the mat and saw no dog", "hills 😀 of glass"]


@pytest.fixture
def model(tmp_path: Path) -> SentenceTransformer:
    return SentenceTransformer(
        modules=[Transformer(tiny_checkpoint(tmp_path, "bert")), Pooling(32)], device="cpu"
    )


@pytest.mark.parametrize(("texts", "options"), [
    (TEXTS, {"padding": True}), (tuple(TEXTS), {"padding": "max_length", "max_length": 40}), ("a cat", {}),
    (TEXTS[:1], {}), ([("a cat", "sat"), ("a", "dog")], {"padding": True}), ([""], {}),
    ([["a", "cat"]], {"is_split_into_words": True}),
    (TEXTS, {"padding": True, "return_offsets_mapping": True, "return_length": True}),
    (TEXTS, {"padding": True, "truncation": True, "max_length": 4, "return_overflowing_tokens": True}),
])  # fmt: skip
def test_a_patched_tokenizer_makes_the_same_tensors(
    model: SentenceTransformer, texts: Any, options: dict[str, Any]
) -> None:
    expected = model.tokenizer(texts, return_tensors="pt", **options)
    with slimformer.patched(model):
        found = model.tokenizer(texts, return_tensors="pt", **options)
        assert (
            model.tokenizer(texts, **options).data
            == slimformer.unpatch(model).tokenizer(texts, **options).data
        )
    assert list(found) == list(expected)
    assert len(found.encodings) == len(expected.encodings)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert torch.equal(found[name], expected[name])


def test_texts_that_make_no_tensor_are_refused_as_before(model: SentenceTransformer) -> None:
    with pytest.raises(ValueError, match="padding=True") as before:
        model.tokenizer(TEXTS, return_tensors="pt")
    with slimformer.patched(model), pytest.raises(ValueError, match="padding=True") as after:
        model.tokenizer(TEXTS, return_tensors="pt")
    assert str(after.value) == str(before.value)


def test_nothing_is_left_on_the_pipeline_or_its_tokenizer(model: SentenceTransformer) -> None:
    before = sorted(vars(model.tokenizer)), sorted(vars(model))
    for patched in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        slimformer.patch(slimformer.patch(patched))
        for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
            assert other.encode.call.pipeline is other
            assert other.tokenizer._encode_plus.call.tokenizer is other.tokenizer
            slimformer.unpatch(other)
            assert (sorted(vars(other.tokenizer)), sorted(vars(other))) == before
        slimformer.unpatch(patched)
        assert (sorted(vars(patched.tokenizer)), sorted(vars(patched))) == before


def test_pipelines_that_share_a_tokenizer_are_unpatched_in_any_order(tmp_path: Path) -> None:
    first, second = (
        SentenceTransformer(
            modules=[Transformer(tiny_checkpoint(tmp_path, "bert")), Pooling(32)], device="cpu"
        )
        for _ in range(2)
    )
    second[0].processor = first[0].processor
    assert second.tokenizer is first.tokenizer
    before = sorted(vars(first.tokenizer))
    slimformer.patch(first)
    slimformer.patch(second)
    slimformer.unpatch(first)
    slimformer.unpatch(second)
    assert sorted(vars(first.tokenizer)) == before


def test_a_failed_patch_leaves_the_pipeline_as_it_was(model: SentenceTransformer) -> None:
    before = sorted(vars(model.tokenizer)), sorted(vars(model))
    with pytest.raises(slimformer.errors.PlanError):
        slimformer.patch(model, slimformer.LayerDrop(mlp=[9]))
    assert (sorted(vars(model.tokenizer)), sorted(vars(model))) == before


class OnAGpu(FillingBatches):
    """Takes its decision as on a GPU, and computes where the model is."""

    def _device_type(self, device: Any) -> str:
        return "cuda"


# The tiny tokenizer makes no token of an empty text, and a batch of such is none.
SOME = [text for text in TEXTS if text]


@pytest.mark.parametrize("call", [
    lambda encode: encode(SOME * 30), lambda encode: encode(SOME * 30, None, "a cat ", 7),
    lambda encode: encode(sentences=SOME), lambda encode: encode("a cat"),
    lambda encode: encode(inputs=SOME * 3, batch_size=5, convert_to_tensor=True),
])  # fmt: skip
def test_batches_of_another_size_give_the_same_vectors(model: SentenceTransformer, call: Any) -> None:
    expected = np.asarray(call(model.encode))
    slimformer.patch(model)
    found = np.asarray(call(OnAGpu(model, transformer_of(model), 32)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-5


def test_a_gpu_gets_as_many_texts_as_keep_it_busy(model: SentenceTransformer) -> None:
    model.max_seq_length = 128
    encode = FillingBatches(model, transformer_of(model), 384)
    assert encode.filling(["x" * 4000, "short"]) == BUSY_FROM_ELEMENTS // (384 * 128)
    assert encode.filling(["x" * 30]) == BUSY_FROM_ELEMENTS // (384 * 32)
    # Pairs and records count with all that they hold, a prompt with every text.
    assert encode.filling([("x" * 30, "y" * 20), ("a", "b")]) == BUSY_FROM_ELEMENTS // (384 * 52)
    assert encode.filling([{"query": "x" * 30, "text": ["y" * 20]}]) == BUSY_FROM_ELEMENTS // (384 * 52)
    assert encode.filling(["x" * 30], "y" * 20) == BUSY_FROM_ELEMENTS // (384 * 52)
    model.prompts = {"query": "y" * 40, "document": ""}
    assert encode.filling(["x" * 30]) == BUSY_FROM_ELEMENTS // (384 * 72)
    model.prompts = {}
    # An image, or nothing at all, has no number of characters.
    assert (
        encode.filling(["x" * 30, {"image": object()}])
        == encode.filling([np.zeros(3)])
        == encode.filling([])
        == 0
    )
    seen: list[int] = []

    class Recording(SentenceTransformer):
        def encode(self, inputs: Any, prompt: Any = None, batch_size: int = 32, **options: Any) -> None:
            seen.append(batch_size)

    model.__class__ = Recording
    recorded = OnAGpu(model, transformer_of(model), 384)
    for asked in ({}, {"batch_size": 100_000}, {"batch_size": 0}):
        recorded(["x" * 30], **asked)
    recorded([{"image": object()}])
    assert seen == [BUSY_FROM_ELEMENTS // (384 * 32), 100_000, 0, 32]
    assert list(inspect.signature(recorded).parameters) == ["inputs", "prompt", "batch_size", "options"]


def test_the_batches_of_a_cpu_are_the_users(model: SentenceTransformer) -> None:
    encode = FillingBatches(model, transformer_of(model), 384)
    assert encode._device_type(None) == "cpu"
    assert encode._device_type("cuda:1") == "cuda"
    assert encode._device_type(["cuda:0", "cuda:1"]) == "several"

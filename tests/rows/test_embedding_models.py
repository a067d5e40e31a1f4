"""The models that people embed with: no padding is computed, and vectors are what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import slimformer
from slimformer.model.anatomy import find_anatomy
from slimformer.model.layer_parts import KINDS
from slow_rows import LAYOUTS, arguments, error, one_thread, outputs, rows_through  # noqa: F401
from tiny_checkpoints import tiny_checkpoint
from tiny_models import COMMON

# Bidirectional unless said otherwise; windows are shorter than the texts.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT-large": ("bert", {"hidden_size": 64, "num_attention_heads": 16, "intermediate_size": 256,
                            "num_hidden_layers": 6}),
    "XLM-R": ("xlm-roberta", {"max_position_embeddings": 130}),
    "MPNet": ("mpnet", {}),
    "ModernBERT": ("modernbert", {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 12}),
    "NomicBERT": ("nomic_bert", {}),
    "GTE": ("gte", {}),
    "Jina v3": ("jina_embeddings_v3", {}),
    "EuroBERT": ("eurobert", {}),
    "EmbeddingGemma": ("gemma3_text", {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8,
                                       "use_bidirectional_attention": True}),
    "Qwen3-Embedding, causal": ("qwen3", {"head_dim": 8}),
}  # fmt: skip
KNOWN = [name for name, (kind, _) in MODELS.items() if kind in CONFIG_MAPPING]
TEXTS = ["a wing", "how does the flow over a thin wing separate", "x", "plates and shells under heat " * 3]


def embedder(name: str) -> PreTrainedModel:
    """A tiny stack with weights under which every sublayer, bias and norm counts."""
    kind, own = MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModel.from_config(AutoConfig.for_model(kind, **{**COMMON, **own})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape)
            if weight.dim() == 1:
                weight.add_(noise * 0.2)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", KNOWN)
def test_texts_have_the_vectors_that_they_had(name: str, layout: str) -> None:
    model, given = embedder(name), arguments("an encoder", LAYOUTS[layout])
    expected = outputs(model, given)
    with slimformer.patched(model):
        assert error(outputs(model, given), expected, given["attention_mask"]) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_half_precision_rounds_as_the_model_itself_does(name: str, dtype: torch.dtype) -> None:
    model, given = embedder(name), arguments("an encoder", LAYOUTS["mixed"])
    mask, exact = given["attention_mask"], outputs(model, given)
    rounded = outputs(model.to(dtype), given)
    actual = outputs(slimformer.patch(model), given)
    assert actual.dtype == dtype
    assert error(actual, exact, mask) <= 1.2 * error(rounded, exact, mask)


@pytest.mark.parametrize("name", KNOWN)
def test_status_says_text_and_no_more_is_computed(name: str) -> None:
    model, given = slimformer.patch(embedder(name)), arguments("an encoder", LAYOUTS["mixed"])
    layers = find_anatomy(model).layers
    assert slimformer.status(model) == {i: dict.fromkeys(KINDS, "text rows") for i in range(len(layers))}
    linears = [module for module in layers.modules() if type(module) is nn.Linear]
    with rows_through(*linears) as rows:
        outputs(model, given)
    assert rows == [int(given["attention_mask"].sum())] * len(linears)


def test_flags_of_whole_numbers_say_what_is_padding() -> None:
    """DeBERTa's layers get such a mask; their attention has projections that are not known, and keeps its padding."""
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("deberta-v2", **COMMON)).eval()
    given = arguments("an encoder", LAYOUTS["mixed"])
    expected = outputs(model, given)
    slimformer.patch(model)
    assert slimformer.status(model)[0] == {"attention": "all rows", "mlp": "text rows"}
    with rows_through(*(layer.intermediate.dense for layer in model.encoder.layer)) as rows:
        actual = outputs(model, given)
    assert rows == [int(given["attention_mask"].sum())] * 4
    assert error(actual, expected, given["attention_mask"]) <= 1e-5


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("include", [True, False], ids=["prompt pooled", "prompt left out"])
@pytest.mark.parametrize("mode", ["lasttoken", "mean", "weightedmean"])
def test_instructions_and_pooling_of_decoders_are_kept(
    tmp_path: Path, mode: str, include: bool, side: str
) -> None:
    transformer = Transformer(tiny_checkpoint(tmp_path, "qwen3"))
    transformer.tokenizer.padding_side = side
    pooling = Pooling(32, pooling_mode=mode, include_prompt=include)
    prompts = {"query": "Instruct: find what answers. Query: ", "document": ""}
    model = SentenceTransformer(modules=[transformer, pooling], prompts=prompts, device="cpu")

    def vectors() -> list[np.ndarray]:
        return [
            model.encode_query(TEXTS, batch_size=3),
            model.encode_document(TEXTS),
            model.encode(TEXTS[:2]),
        ]

    dense = vectors()
    alone = np.stack([model.encode_query([text])[0] for text in TEXTS])
    with slimformer.patched(model):
        slim = vectors()
    for found, wanted in zip(slim, dense, strict=True):
        assert np.abs(found - wanted).max() < 1e-5
    assert np.abs(slim[0] - alone).max() < 1e-4
    assert np.abs(dense[0] - dense[1]).max() > 1e-2

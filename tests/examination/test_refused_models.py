"""What is given to `patch` and cannot be patched says what to pass instead; what is changed afterwards, what to do."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Router, Transformer
from torch import nn
from transformers import BartConfig, BartModel, PreTrainedModel, WhisperConfig, WhisperModel

import slimformer
from slimformer import LayerDrop
from slimformer.errors import UnsupportedModelError
from tiny_checkpoints import tiny_checkpoint
from tiny_models import tiny_model

_SMALL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 64,
          "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip


@pytest.mark.parametrize("whole", [
    BartModel(BartConfig(**_SMALL, max_position_embeddings=64)), WhisperModel(WhisperConfig(**_SMALL, num_mel_bins=8)),
], ids=["bart", "whisper"])  # fmt: skip
def test_only_a_whole_encoder_decoder_is_told_to_pass_its_encoder(whole: PreTrainedModel) -> None:
    with pytest.raises(UnsupportedModelError, match=r"pass the encoder \(`model\.get_encoder\(\)`\)"):
        slimformer.patch(whole)
    # Its configuration is that of the whole model; whether it is supported is decided by its layers.
    with contextlib.suppress(UnsupportedModelError):
        assert slimformer.status(slimformer.patch(whole.get_encoder(), LayerDrop(mlp=[1])))
        return
    with pytest.raises(UnsupportedModelError) as error:
        slimformer.patch(whole.get_encoder())
    assert "get_encoder" not in str(error.value)


def test_a_pipeline_of_several_models_names_what_to_patch(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "bert")
    routes: list[list[nn.Module]] = [[Transformer(folder), Pooling(32)] for _ in range(2)]
    router = Router.for_query_document(query_modules=routes[0], document_modules=routes[1])
    model = SentenceTransformer(modules=[router], device="cpu")
    with pytest.raises(
        UnsupportedModelError, match=r"first module is Router\. Patch what is inside it \(BertModel\)"
    ):
        slimformer.patch(model)
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            assert slimformer.status(slimformer.patch(part))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_compiled_model_is_told_to_be_patched_before(name: str) -> None:
    model = tiny_model(name)
    compiled = torch.compile(model)
    for call in (slimformer.patch, slimformer.unpatch, slimformer.status):
        with pytest.raises(
            UnsupportedModelError, match=r"torch\.compile\(slimformer\.patch\(model\)\).*_orig_mod"
        ):
            call(compiled)
    assert slimformer.status(slimformer.patch(compiled._orig_mod)) == slimformer.status(model) != {}


def _sliced(layers: nn.ModuleList) -> nn.ModuleList:
    return layers[:2]


def _replaced(layers: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList([*layers[:3], tiny_model("bert").encoder.layer[3]])


def _turned(layers: nn.ModuleList) -> nn.ModuleList:
    return nn.ModuleList(reversed(layers))


@pytest.mark.parametrize("change", [_sliced, _replaced, _turned])
@pytest.mark.parametrize("methods", [(), (LayerDrop(mlp=[1]),)], ids=["plain", "drop"])
def test_layers_changed_after_the_patch_are_refused_where_padding_leaves(
    change: Any, methods: tuple[Any, ...]
) -> None:
    model = slimformer.patch(tiny_model("bert"), *methods)
    ids, mask = torch.arange(3, 13).expand(2, -1), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :4] = 0
    model.encoder.layer = change(model.encoder.layer)
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedModelError, match=r"layer of BertEncoder holds other layers"),
    ):
        model(ids, attention_mask=mask)
    # Nothing has left where there is no padding, and every layer computes what it computes.
    with torch.no_grad():
        assert model(ids).last_hidden_state.shape == (2, 10, 32)
        slimformer.unpatch(model)
        other = tiny_model("bert")
        other.encoder.layer = change(other.encoder.layer)
        assert torch.equal(*(m(ids, attention_mask=mask).last_hidden_state for m in (model, other)))

"""What a layer computes is found out before it is changed: the model classes on which that went wrong, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BartConfig, BartModel, FunnelConfig, FunnelModel, PreTrainedModel

import slimformer
from slimformer import LayerDrop
from slimformer.calls.masks import read_mask
from slimformer.errors import UnsupportedModelError
from slimformer.model.anatomy import find_anatomy
from slow_rows import arguments, error, outputs
from sweep.classes import Family
from sweep.models import build
from sweep.outcomes import outcome_of
from sweep.run import every
from tiny_models import tiny_model

ROWS = {
    "roberta-prelayernorm": "a norm between the attention module and the one that attends",
    "convbert": "a convolution over padding",
    "yoso": "keys of padding that are seen",
    "longformer": "a mask of additions for every key",
    "gpt_neo": "layers that are told no positions, behind a window",
    "owlvit_text_model": "no known table of embeddings",
    "granite4_vision_text": "a stack that makes no cache by itself",
}
SUBLAYERS = {
    "openai-gpt": "lists of results",
    "xmod": "a module that takes more than the residual",
    "mistral_large4_text": "choices of keys that go to the layers above",
    "gemma4_text": "keys of other layers",
    "gemma3n_text": "keys of other layers, and several streams",
    "esmc": "an attention that outweighs the residual",
    "inkling_text": "a convolution behind the MLP, too",
    "ibert": "modules that return a scale beside their output",
    "nemotron_h": "MLPs that are called mixers",
    "canine": "layers that get other tokens than the model",
    "blip_text_model": "a decoder that keeps a cache only where it gets one",
    "t5": "a stack that refuses to be asked for a cache",
    "t5gemma": "a config inside a config",
    "umt5": "an encoder with the config of an encoder-decoder model",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def family(name: str) -> Family:
    """A class that this release may not have yet."""
    if name not in every():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return every()[name]


@pytest.mark.parametrize("name", [*ROWS, *SUBLAYERS])
def test_a_class_computes_the_same_under_every_method_that_is_not_refused(name: str) -> None:
    result = outcome_of(family(name))
    assert (result.outcome, result.wrong()) == ("rows" if name in ROWS else "sublayers", {}), result.detail


def test_queries_of_one_linear_layer_are_no_mlp_and_what_follows_them_mixes() -> None:
    support = slimformer.support(build(family("ibert")))
    for modules in support.modules:
        paths = {kind: [entry.path for entry in entries] for kind, entries in modules.silent.items()}
        assert paths == {"attention": ["attention.output.dense"], "mlp": ["output.dense"]}


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n_text"])
def test_an_attention_that_makes_the_keys_of_other_layers_is_not_dropped(name: str) -> None:
    model = build(family(name))
    givers = [i for i, of in enumerate(slimformer.support(model).modules) if "attention" not in of.silent]
    attentions = [layer.get_submodule("self_attn") for layer in find_anatomy(model).layers]
    takers = [i for i, attention in enumerate(attentions) if attention.is_kv_shared_layer]
    assert 0 < len(givers) <= max(givers) < min(takers)
    for drop in (LayerDrop(attention=[givers[0]]), LayerDrop(block=[givers[0]])):
        with pytest.raises(UnsupportedModelError, match="other layers use what it leaves for them"):
            slimformer.patch(model, drop)
    slimformer.patch(model, LayerDrop(attention=[takers[0]]))


def state(model: nn.Module) -> Mapping[str, Any]:
    return {
        **dict(model.named_parameters()),
        **{f"{n} (buffer)": b.clone() for n, b in model.named_buffers()},
    }


ROPES: dict[str, dict[str, Any]] = {
    "longrope": {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0], "factor": 4.0,
                 "original_max_position_embeddings": 32},
    "dynamic": {"factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES)
def test_an_examination_far_behind_the_trained_length_leaves_no_trace(rope: str) -> None:
    own = {"rope_type": rope, "rope_theta": 1e4, **ROPES[rope]}
    model = tiny_model("llama", rope_parameters=own)
    before, rotary = state(model), dict(vars(find_anatomy(model).stack.rotary_emb))
    assert slimformer.support(model).tier == "rows"
    after = state(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(vars(find_anatomy(model).stack.rotary_emb)[name] is value for name, value in rotary.items())


def encoder() -> PreTrainedModel:
    sizes = {"d_model": 32, "vocab_size": 64, "max_position_embeddings": 64}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 3, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 48}
    torch.manual_seed(0)
    return BartModel(BartConfig(**sizes)).eval().get_encoder()


def test_the_encoder_of_an_encoder_decoder_model_is_patched_by_itself() -> None:
    model, given = encoder(), arguments("bert", [(0, 24), (0, 19)])
    whole, text = outputs(model, given), given["attention_mask"]
    assert error(outputs(slimformer.patch(model), given), whole, text) <= 1e-5
    dropped = outputs(slimformer.patch(model, LayerDrop(attention=[1], mlp=[2])), given)
    assert error(dropped, whole, text) > 1e-3
    assert torch.equal(outputs(slimformer.unpatch(model), given), whole)


def test_layers_in_lists_that_pool_between_them_are_refused_in_words() -> None:
    config = FunnelConfig(vocab_size=64, block_sizes=[2, 2], d_model=32, n_head=2, d_head=16, d_inner=48)
    with pytest.raises(UnsupportedModelError, match="has as many entries as its config says layers"):
        slimformer.patch(FunnelModel(config))


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ([[0.0, 0.0, LOWEST], [0.0, 0.0, 0.0]], [[1, 1, 0], [1, 1, 1]]),
        ([[0.0, 0.0, 0.0]], [[1, 1, 1]]),
        ([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]], [[1, 1, 0], [0, 0, 0]]),
    ],
)
def test_a_mask_of_keys_is_read_as_flags_or_as_additions(
    mask: list[list[float]], text: list[list[int]]
) -> None:
    reading = read_mask(torch.tensor(mask), len(mask), 3, causal=False)
    assert isinstance(reading.text, Tensor)
    assert reading.text.int().tolist() == text

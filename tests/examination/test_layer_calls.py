"""What layers are called with is found by running the stack, and a cache under an unknown name is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

import slimformer
from slimformer.calls.layer_calls import cache_argument, layer_calls
from slimformer.errors import SlimformerWarning, UnsupportedModelError
from slimformer.model.anatomy import find_anatomy
from slow_rows import batch, error, outputs, small
from tiny_models import DECODERS, ENCODERS, tiny_model

STEPS = 3


def cached(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a batch read in a prefill and three steps of one token."""
    tokens, cache, found = given["input_ids"].shape[1], DynamicCache(config=model.config), []
    for begin, end in [(0, tokens - STEPS), *((i, i + 1) for i in range(tokens - STEPS, tokens))]:
        part = {name: given[name][:, begin:end] for name in ("input_ids", "position_ids")}
        part["attention_mask"] = given["attention_mask"][:, :end]
        found.append(outputs(model, part, use_cache=True, **{cache_argument(model): cache}))
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", DECODERS)
def test_cached_steps_of_a_padded_batch_are_those_of_the_unpatched_model(name: str) -> None:
    model, given = small(name), batch(name, "left")
    expected = cached(model, given)
    slimformer.patch(model)
    assert error(cached(model, given), expected, given["attention_mask"]) <= 1e-5


class RenamedCacheLayer(modeling_llama.LlamaDecoderLayer):
    """As a future release might have it: the cache comes under a new name."""

    def forward(self, hidden_states: torch.Tensor, kv_store: Any = None, **kwargs: Any) -> Any:
        """Takes `kv_store` for what the layer above it calls the cache."""
        return super().forward(hidden_states, **kwargs, **{cache_argument(super()): kv_store})


class RenamedCacheModel(modeling_llama.LlamaModel):
    """A stack that hands its cache on under that name."""

    def forward(self, input_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
        """Calls the layers only, which is all that is looked at."""
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, kv_store=DynamicCache() if use_cache else None)
        return hidden


class ForgetfulModel(RenamedCacheModel):
    """A stack that is asked to keep a cache and hands over none."""

    def forward(self, input_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> Any:
        """Calls the layers without one."""
        return super().forward(input_ids, False, **kwargs)


@pytest.mark.parametrize(("kind", "words"), [(RenamedCacheModel, "'kv_store'"), (ForgetfulModel, "got none")])
def test_a_cache_that_is_not_found_is_refused(kind: type, words: str) -> None:
    model = tiny_model("llama").model
    before = set(model.state_dict())
    model.__class__ = kind
    with pytest.raises(UnsupportedModelError, match=words):
        slimformer.patch(model)
    assert slimformer.status(model) == {}
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_running_the_stack_over_stubs_leaves_the_model_as_it_was(name: str) -> None:
    model, given = small(name).train(), batch(name, "left")
    anatomy = find_anatomy(model)
    hooked: list[int] = []
    anatomy.layers[1].register_forward_hook(lambda *_: hooked.append(1))
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    calls = layer_calls(anatomy, tokens=12, batch=2, padding="left")
    assert calls is not None
    assert len(calls.arguments) == len(anatomy.layers)
    assert calls.hidden.shape == (2, 12, 32)
    assert hooked == []
    for path, module in model.named_modules():
        assert vars(module).keys() == before[path].keys()
        assert all(vars(module)[key] is value for key, value in before[path].items())
    # Dropout in the embeddings would show here.
    assert torch.equal(calls.hidden, layer_calls(anatomy, tokens=12, batch=2, padding="left").hidden)
    assert given


def test_a_newer_transformers_than_was_swept_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slimformer.versions.NEWEST_SWEPT", "5.0.0")
    monkeypatch.setattr("slimformer.versions._warned", [])
    model = tiny_model("llama")
    with pytest.warns(SlimformerWarning, match=r"transformers .* newer than 5\.0\.0"):
        slimformer.patch(model)
    slimformer.patch(model)

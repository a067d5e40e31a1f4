"""The structure table finds the layers of every supported family and refuses the rest."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import T5Config, T5Model
from transformers.cache_utils import DynamicLayer

from slimformer.cache.filter_state import FilterState
from slimformer.cache.slots import compact_slots
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.model.anatomy import find_anatomy
from tiny_models import DECODERS, ENCODERS, tiny_model


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_every_structure_is_found(name: str) -> None:
    anatomy = find_anatomy(tiny_model(name))
    assert len(anatomy.layers) == 4
    assert anatomy.causal == (name in DECODERS)


def test_encoder_decoder_and_foreign_modules_are_refused() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        find_anatomy(T5Model(config))
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        find_anatomy(nn.Linear(2, 2))


def test_an_extra_child_makes_a_layer_unknown() -> None:
    model = tiny_model("llama")
    model.model.layers[0].extra = nn.Linear(2, 2)
    anatomy = find_anatomy(model)
    assert not anatomy.structure.apart
    assert "extra" in anatomy.unknown


def test_slots_are_compact_within_their_type() -> None:
    assert compact_slots(["s", "s", "f", "s"], dropped=[0]) == [3, 0, 2, 1]
    with pytest.raises(PlanError, match="Keep at least one"):
        compact_slots(["s", "f"], dropped=[0])


def test_filter_state_remembers_reorders_and_crops() -> None:
    layer = FilterState(DynamicLayer(), taps=3)
    x = torch.randn(2, 5, 4)
    full = layer.extend(x[:, :3])
    torch.testing.assert_close(full, torch.cat([torch.zeros(2, 2, 4), x[:, :3]], 1))
    torch.testing.assert_close(layer.extend(x[:, 3:4]), x[:, 1:4])
    layer.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(layer.state[:, -2:], x[[1, 0], 2:4])
    layer.extend(x[[1, 0], 4:5])
    layer.crop(-1)
    torch.testing.assert_close(layer.state[:, -2:], x[[1, 0], 2:4])
    assert layer.seen == 4
    with pytest.raises(PlanError, match="activate_past_recording"):
        layer.crop(-5)

"""A dropped sublayer leaves its layer's results as the stack takes them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel

import slimformer
from slimformer import LayerDrop
from slimformer.errors import SlimformerError
from slow_rows import one_thread  # noqa: F401
from tiny_models import COMMON

RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": -1}


def handed_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """What a dropped attention of a post-norm layer leaves: its input."""
    return hidden_states, None


@pytest.mark.parametrize("own", [{}, RELATIVE], ids=["absolute", "relative"])
@pytest.mark.parametrize("name", ["deberta", "deberta-v2"])
def test_deberta_loses_an_attention_or_is_refused_when_it_is_patched(name: str, own: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model: Any = AutoModel.from_config(AutoConfig.for_model(name, **{**COMMON, **own})).eval()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad():
        dense = model(ids, attention_mask=mask)[0]
        model.encoder.layer[1].attention.forward = handed_on
        expected = model(ids, attention_mask=mask)[0]
        del model.encoder.layer[1].attention.forward
        try:
            slimformer.patch(model, LayerDrop(attention=[1]))
        except SlimformerError:
            assert torch.equal(model(ids, attention_mask=mask)[0], dense)
            return
        found = model(ids, attention_mask=mask)[0]
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)

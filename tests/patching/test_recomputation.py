"""Gradient checkpointing gives the gradients of a plain backward pass: layers are computed again as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.patching.test_undo import IDS, sharp
from torch import Tensor
from transformers import PreTrainedModel

import slimformer
from slimformer.methods.rope_scaling import RopeScaling
from slimformer.methods.temperature import LogNScale

MASK = torch.ones_like(IDS)
MASK[0, :12] = 0


def gradients(
    model: PreTrainedModel, checkpointing: dict[str, Any] | None, **inputs: Any
) -> dict[str, Tensor]:
    """Those of all parameters; layers are computed again in the backward pass where checkpointing is on."""
    if checkpointing is not None:
        model.gradient_checkpointing_enable(checkpointing)
        model.enable_input_require_grads()
    # Dropout is off; training is what turns checkpointing on.
    model.train()
    output = model(**inputs, use_cache=False)
    output[0].float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(model: PreTrainedModel, again: PreTrainedModel, reentrant: bool, **inputs: Any) -> None:
    expected = gradients(model, None, **inputs)
    found = gradients(again, {"use_reentrant": reentrant}, **inputs)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_query_factors_are_those_of_the_call(name: str, reentrant: bool) -> None:
    off = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if name == "gpt2" else {}
    model, again = (slimformer.patch(sharp(name, **off), LogNScale(4)) for _ in range(2))
    assert_alike(model, again, reentrant, input_ids=IDS, attention_mask=MASK)
    slimformer.unpatch(again)
    again.gradient_checkpointing_disable()
    assert not any(
        type(v).__module__.startswith("slimformer") for m in again.modules() for v in vars(m).values()
    )


def test_checkpointing_turned_on_before_the_patch_is_as_it_was_behind_it() -> None:
    model = sharp()
    model.gradient_checkpointing_enable()
    own = [vars(layer)["_gradient_checkpointing_func"] for layer in model.model.layers]
    slimformer.patch(model, RopeScaling("yarn", 4.0, trained_length=10))
    gradients(model, None, input_ids=IDS, attention_mask=MASK)
    slimformer.unpatch(model)
    assert [vars(layer)["_gradient_checkpointing_func"] for layer in model.model.layers] == own

"""How much Python a step of decoding runs for each patched layer: on a GPU, small models wait for it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

import slimformer
import slimformer_kernels
from slimformer import LayerDrop, MixtureOfDepths
from slimformer.patching import keep_ratios
from slow_rows import one_thread, small  # noqa: F401

FOLDERS = tuple(
    os.path.dirname(str(package.__file__)) + os.sep for package in (slimformer, slimformer_kernels)
)
# Layers of the two models whose difference is what layers cost; what the stack costs is in both.
FEW, MANY = 4, 8


def calls_in_a_step(model: nn.Module) -> int:
    """How many Python functions of this library run in one step of one token, behind a prompt and a first step."""
    cache, ids, count = DynamicCache(config=model.config), torch.arange(3, 15)[None], 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(FOLDERS)

    with torch.no_grad():
        for start, end in ((0, 10), (10, 11)):
            model(ids[:, start:end], past_key_values=cache, use_cache=True)
        sys.setprofile(note)
        try:
            model(ids[:, 11:12], past_key_values=cache, use_cache=True)
        finally:
            sys.setprofile(None)
    return count


def calls_per_layer(method: Any) -> float:
    """The calls that each further layer makes, where every layer is treated alike from the second on."""
    counts = []
    for layers in (FEW, MANY):
        model = small("llama", num_hidden_layers=layers)
        counts.append(calls_in_a_step(slimformer.patch(model, *method(range(1, layers)))))
    return (counts[1] - counts[0]) / (MANY - FEW)


def filters(layers: Sequence[int], taps: int) -> LayerDrop:
    weights: dict[str, Tensor] = {}
    for index in layers:
        weights[f"attention.{index}.weight"] = torch.zeros(32, taps * 32)
        weights[f"attention.{index}.bias"] = torch.zeros(32)
    return LayerDrop(attention=list(layers), replace="filter", taps=taps, weights=weights)


def routed(layers: Sequence[int], bias: float) -> MixtureOfDepths:
    kept = MixtureOfDepths.keeping_everything(32, attention=list(layers), mlp=list(layers))
    return kept.lowered(1.0 - bias)


def test_a_step_of_a_layer_that_nothing_touches_makes_two_calls() -> None:
    assert calls_per_layer(lambda layers: ()) <= 2


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (lambda layers: (LayerDrop(mlp=list(layers)),), 16),
        (lambda layers: (LayerDrop(attention=list(layers)),), 20),
        (lambda layers: (LayerDrop(block=list(layers)),), 12),
        (lambda layers: (filters(layers, 1),), 24),
        (lambda layers: (filters(layers, 4),), 33),
    ],
    ids=["without MLPs", "without attentions", "without both", "filters", "filters of four taps"],
)
def test_a_step_of_a_layer_without_sublayers_makes_few_calls(method: Any, most: int) -> None:
    assert calls_per_layer(method) <= most


@pytest.mark.parametrize("bias", [1.0, -1.0], ids=["every token", "no token"])
def test_a_step_of_a_routed_layer_makes_at_most_40_calls(bias: float) -> None:
    assert calls_per_layer(lambda layers: (routed(layers, bias),)) <= 40


def test_a_step_of_a_routed_model_makes_at_most_40_calls_a_layer_with_all_that_the_stack_costs() -> None:
    model = small("llama", num_hidden_layers=MANY)
    generator = torch.Generator().manual_seed(4)
    layers = list(range(MANY))
    weights = {
        f"{kind}.{index}.{name}": torch.randn(32 if name == "weight" else 1, generator=generator)
        for kind in ("attention", "mlp")
        for index in layers
        for name in ("weight", "bias")
    }
    slimformer.patch(model, MixtureOfDepths(attention=layers, mlp=layers, weights=weights))
    assert calls_in_a_step(model) <= 40 * MANY
    # Some sublayers computed the token, and some did not.
    assert set(keep_ratios(model).values()) == {0.0, 1.0}

"""A model that lies on two GPUs generates under every kind of plan what it generates on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import slimformer
from gpu.plans import METHODS
from gpu.subjects import DEVICE, DRY, arguments, build, moved, off, outputs
from slimformer.errors import PlanError

NAMED = {method.name: method for method in METHODS}
TEXTS = ((30, 124), (0, 154), (110, 44))
pytestmark = pytest.mark.skipif(
    not DRY and torch.cuda.device_count() < 2, reason="needs two CUDA devices that this process sees"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small decoder."""
    folder = tmp_path_factory.mktemp("split")
    build("llama").save_pretrained(folder)
    return folder


def split(folder: Path) -> PreTrainedModel:
    """The model with its first layers on one GPU and the others on the next, as accelerate divides it."""
    if DRY:
        return AutoModelForCausalLM.from_pretrained(
            folder, device_map={"": "cpu"}, dtype=torch.float32
        ).eval()
    size = sum(t.numel() * t.element_size() for t in build("llama").state_dict().values())
    # Neither could take it all; the first also keeps room for what is moved.
    room = {0: int(0.85 * size), 1: 4 * size}
    model = AutoModelForCausalLM.from_pretrained(
        folder, device_map="auto", max_memory=room, dtype=torch.float32
    )
    assert {str(device) for device in model.hf_device_map.values()} == {"0", "1"}, model.hf_device_map
    return model.eval()


def generated(model: Any, given: dict[str, Tensor]) -> Tensor:
    """The tokens that a model finds most likely behind three texts."""
    prompt = {name: given[name] for name in ("input_ids", "attention_mask")}
    found: Tensor = model.generate(**prompt, do_sample=False, min_new_tokens=24, max_new_tokens=24)
    return found.cpu()


def test_the_plain_patch_generates_what_the_model_does(folder: Path) -> None:
    model, given = split(folder), moved(arguments("llama", TEXTS, 154))
    expected, logits = generated(model, given), outputs(model, given)
    slimformer.patch(model)
    assert off(outputs(model, given), logits, given["attention_mask"]) <= 1e-4
    assert torch.equal(generated(model, given), expected)
    slimformer.unpatch(model)
    assert torch.equal(outputs(model, given), logits)


@pytest.mark.parametrize(
    "plan", ["drop-mean", "drop-filter", "routed-threshold", "random-ragged", "self-extend"]
)
def test_a_plan_gives_on_two_gpus_what_it_gives_on_one(folder: Path, plan: str) -> None:
    method, given = NAMED[plan], moved(arguments("llama", TEXTS, 154))
    one = slimformer.patch(build("llama", device=DEVICE), *method.plan())
    two = slimformer.patch(split(folder), *method.plan())
    assert off(outputs(two, given), outputs(one, given), given["attention_mask"]) <= 1e-4
    assert torch.equal(generated(two, given), generated(one, given))


def test_tokens_do_not_leave_a_model_whose_layers_are_moved_to(folder: Path) -> None:
    model, given = split(folder), moved(arguments("llama", TEXTS, 154))
    expected = outputs(model, given)
    with pytest.raises(PlanError, match="Tokens cannot leave the model"):
        slimformer.patch(model, *NAMED["leave-random"].plan())
    assert torch.equal(outputs(model, given), expected)

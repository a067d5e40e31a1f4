"""Text generated from CUDA graphs is what the launched steps give, and costs no memory that grows."""

from __future__ import annotations

import gc
import random
import resource
from typing import Any

import pytest
import torch
from torch import Tensor

import slimformer
from gpu.plans import METHODS
from gpu.subjects import DECODERS, DEVICE, DRY, build
from slimformer import SelfSpeculation
from slimformer.changes.running_calls import PATCH
from slimformer.decoding import capture

NAMED = {method.name: method for method in METHODS}
NEW = 48


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    if DRY:
        monkeypatch.setattr(capture, "_CAPTURES", {"cpu": lambda: True})


def prompts(rows: int = 3, tokens: int = 70, padded: int = 9) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return (ids * mask).to(DEVICE), mask.to(DEVICE)


def generated(model: Any, given: tuple[Tensor, Tensor] | None = None, **options: Any) -> Tensor:
    ids, mask = prompts() if given is None else given
    chosen = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    found: Tensor = model.generate(ids, attention_mask=mask, **chosen)
    return found


def stepping(model: Any) -> Any:
    return next(vars(m)[PATCH] for m in model.modules() if PATCH in vars(m)).reports["steps"]


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_tokens_in_float32(name: str) -> None:
    model = build(name, torch.float32, DEVICE)
    expected = [generated(model), generated(model, prompts(1, 33, 0)), generated(model, num_beams=3)]
    slimformer.patch(model)
    for _ in range(2):
        found = [generated(model), generated(model, prompts(1, 33, 0)), generated(model, num_beams=3)]
        assert all(map(torch.equal, found, expected))
    assert stepping(model).captured == 3, stepping(model)
    assert stepping(model).steps > 5 * (NEW - 2), stepping(model)


@pytest.mark.parametrize("name", DECODERS)
def test_half_precision_is_replayed_too(name: str) -> None:
    model = slimformer.patch(build(name, torch.bfloat16, DEVICE))
    generated(model)
    assert stepping(model).steps == NEW - 2, stepping(model)


@pytest.mark.parametrize(
    "plan",
    [
        "drop-mean",
        "drop-filter",
        "exit",
        "routed-threshold",
        "leave-random",
        "delta",
        "temperature",
        "log-n",
        "self-extend",
        "rope-linear",
    ],
)
def test_greedy_tokens_of_plans_in_float32(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", torch.float32, DEVICE)
    with monkeypatch.context() as launched:
        launched.setattr(capture, "_CAPTURES", {})
        expected = generated(slimformer.patch(model, *NAMED[plan].plan()))
    slimformer.patch(model, *NAMED[plan].plan())
    assert torch.equal(generated(model), expected), stepping(model)
    # Where a text comes to be so long that keys are turned, a step is launched.
    assert stepping(model).steps > NEW - 6, stepping(model)


def test_sampling_draws_the_same_numbers() -> None:
    model = build("llama", torch.float32, DEVICE)
    torch.manual_seed(3)
    expected = generated(model, do_sample=True, temperature=0.8, num_return_sequences=2)
    slimformer.patch(model)
    torch.manual_seed(3)
    assert torch.equal(generated(model, do_sample=True, temperature=0.8, num_return_sequences=2), expected)


def test_long_texts_move_to_larger_rooms() -> None:
    model = build("gemma2", torch.float32, DEVICE)
    expected = generated(model, max_new_tokens=600)
    slimformer.patch(model)
    # Of a room that is too small from the start.
    generated(model, max_new_tokens=4)
    assert torch.equal(generated(model, max_new_tokens=600), expected)


def test_drafts_beside_graphs() -> None:
    model = build("llama", torch.float32, DEVICE)
    expected = generated(model, prompts(1, 50, 0))
    slimformer.patch(model, SelfSpeculation(slimformer.LayerDrop(block=[2])))
    assert torch.equal(generated(model, prompts(1, 50, 0)), expected)


@pytest.mark.skipif(DRY, reason="needs a GPU")
def test_memory_does_not_grow_and_is_given_back() -> None:
    model = build("llama", torch.bfloat16, DEVICE)
    lengths = [(rows, tokens, new) for rows in (1, 2, 4) for tokens in (20, 60, 200) for new in (5, 17)]
    patched, unpatched = [], []
    for _ in range(3):
        slimformer.patch(model)
        for _ in range(3):
            for rows, tokens, new in lengths:
                generated(model, prompts(rows, tokens, 0), max_new_tokens=new)
            patched.append(torch.cuda.memory_allocated())
        slimformer.unpatch(model)
        gc.collect()
        torch.cuda.synchronize()
        unpatched.append(torch.cuda.memory_allocated())
    # The libraries' own workspaces are there from the first round on.
    assert patched[5] == patched[4], patched
    assert unpatched[1:] == unpatched[:1] * 2, unpatched
    assert unpatched[0] < patched[0], (unpatched, patched)


@pytest.mark.skipif(DRY, reason="needs a GPU")
def test_two_thousand_calls_of_mixed_sizes_take_no_more_and_more_memory() -> None:
    model = slimformer.patch(build("llama", torch.bfloat16, DEVICE))
    sizes = random.Random(0)
    held: list[tuple[int, int, int]] = []
    for call in range(2001):
        # Libraries keep a plan for every shape that they have seen, on the host.
        rows, tokens, new = sizes.choice((1, 1, 2, 4)), sizes.choice(range(5, 400, 33)), sizes.randint(2, 12)
        padded = sizes.randint(0, 2) if rows > 1 else 0
        options = sizes.choice(({}, {}, {"do_sample": True}, {"num_beams": 2}))
        generated(model, prompts(rows, tokens, padded), max_new_tokens=new, **options)
        if call % 250 == 0:
            gc.collect()
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), resident))
    allocated, reserved, resident = zip(*held, strict=True)
    assert stepping(model).steps > 4000, stepping(model)
    # The largest rooms of every batch are there after a quarter.
    assert max(allocated[4:]) <= max(allocated[2:4]) + (1 << 20), held
    assert max(reserved[4:]) <= max(reserved[2:4]) + (64 << 20), held
    # In kilobytes.
    assert resident[-1] - resident[4] < 64 << 10, held

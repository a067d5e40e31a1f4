"""Speed is measured beside dense in one run: right shapes and bytes, and the model is as it was."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel

import slimformer
from slimformer import LayerDrop
from slimformer.calls.layer_calls import CACHE_NAMES
from slimformer.errors import CalibrationError, DataError, PlanError
from slimformer.evaluation.timing.speed import SpeedComparison, measure_speed
from tiny_models import dropped, tiny_model

HALF = LayerDrop(attention=[0, 2])
SMALL = {"prompt_tokens": 12, "new_tokens": 3, "batch_size": 2, "repeats": 3}


def state(model: nn.Module) -> Iterator[tuple[str, list[str], bool]]:
    for name, module in model.named_modules():
        yield name, sorted(vars(module)), module.training


def recorded(model: PreTrainedModel) -> list[tuple[int, int, bool]]:
    """Fills with (tokens read, tokens cached before, patched) at every call of the model."""
    calls: list[tuple[int, int, bool]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        seen = 0 if cache is None else cache.get_seq_length()
        calls.append((kwargs["input_ids"].shape[1], seen, slimformer.status(module) != {}))

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


@pytest.mark.parametrize(("name", "heads"), [("llama", 2), ("gpt2", 4), ("gpt_neox", 4), ("qwen3", 2)])
def test_half_of_the_attentions_keep_half_of_the_cache(name: str, heads: int) -> None:
    model = tiny_model(name)
    before = list(state(model))
    speed = measure_speed(model, HALF, **SMALL)
    # layers x keys and values x sequences x tokens x heads x width x bytes of float32
    assert speed.dense.cache_bytes == 4 * 2 * 2 * 15 * heads * 8 * 4
    assert speed.slim.cache_bytes * 2 == speed.dense.cache_bytes
    assert (speed.prompt_tokens, speed.new_tokens, speed.batch_size, speed.repeats) == (12, 3, 2, 3)
    assert list(state(model)) == before
    assert slimformer.status(model) == {}


def test_dense_and_slim_take_turns_and_decode_on_a_filled_cache() -> None:
    model = tiny_model("llama")
    calls = recorded(model)
    measure_speed(model, HALF, **SMALL)
    turn = [(12, 0), (1, 12), (1, 13), (1, 14)]
    expected = [(*call, patched) for _ in range(4) for patched in (False, True) for call in turn]
    assert calls == expected


def test_times_are_positive_ordered_and_survive_json() -> None:
    speed = measure_speed(tiny_model("llama"), HALF, **SMALL)
    for side in (speed.dense, speed.slim):
        assert 0 < side.prefill_p20 <= side.prefill_seconds <= side.prefill_p80
        assert 0 < side.decode_p20 <= side.decode_seconds_per_token <= side.decode_p80
        assert (side.peak_bytes is None) == (not torch.cuda.is_available() or speed.device.startswith("cpu"))
    assert speed.prefill_speedup == speed.dense.prefill_seconds / speed.slim.prefill_seconds
    assert speed.decode_speedup == (
        speed.dense.decode_seconds_per_token / speed.slim.decode_seconds_per_token
    )
    written = json.loads(json.dumps(speed.to_dict()))
    assert written == speed.to_dict()
    assert written["slim"]["cache_bytes"] == speed.slim.cache_bytes
    assert written["decode_speedup"] == speed.decode_speedup
    assert speed.device == f"cpu, {torch.get_num_threads()} threads"


@pytest.mark.parametrize("name", ["bert", "mpnet", "modernbert"])
def test_an_encoder_has_a_prefill_only(name: str) -> None:
    model = tiny_model(name)
    before, calls = list(state(model)), recorded(model)
    speed = measure_speed(model, HALF, **SMALL)
    # Patching reads eight tokens itself, to check that the structure is understood.
    measured = [call for call in calls if call[0] != 8]
    assert measured == [(12, 0, patched) for _ in range(4) for patched in (False, True)]
    for side in (speed.dense, speed.slim):
        assert side.prefill_seconds > 0
        assert (side.decode_seconds_per_token, side.decode_p20, side.decode_p80) == (None, None, None)
        assert (side.cache_bytes, side.peak_bytes) == (None, None)
    assert (speed.new_tokens, speed.decode_speedup) == (0, None)
    assert json.loads(json.dumps(speed.to_dict())) == speed.to_dict()
    assert [flags for *_, flags in state(model)] == [flags for *_, flags in before]


def test_sliding_windows_and_models_without_a_head_are_measured() -> None:
    speed = measure_speed(tiny_model("gemma2"), LayerDrop(attention=[2]), prompt_tokens=20, repeats=1)
    # Two sliding layers hold 15 of 52 tokens (the window without the newest), two full ones all of them.
    token = speed.dense.cache_bytes // (2 * 15 + 2 * 52)
    assert speed.slim.cache_bytes == speed.dense.cache_bytes - 15 * token
    bare = AutoModel.from_config(tiny_model("llama").config)
    assert measure_speed(bare, HALF, **SMALL).slim.cache_bytes > 0


def test_the_model_is_as_it_was_also_after_an_exception() -> None:
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    twin = copy.deepcopy(model)
    calls = recorded(model)
    before = list(state(model))

    def fail(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if len(calls) == 6:
            raise RuntimeError("in the slim decode")

    handle = model.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(RuntimeError, match="in the slim decode"):
        measure_speed(model, HALF, **SMALL)
    handle.remove()
    assert calls[-1] == (1, 12, True)
    assert list(state(model)) == before
    assert slimformer.status(model) == {}
    ids = torch.arange(3, 13)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=ids).logits, twin.eval()(input_ids=ids).logits)


def test_the_random_state_is_left_alone_and_the_seed_gives_the_tokens() -> None:
    model, read = tiny_model("llama"), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].tolist()), with_kwargs=True
    )
    state_before = torch.get_rng_state()
    sizes = {"prompt_tokens": 4, "new_tokens": 1, "repeats": 1}
    for seed in (1, 1, 2):
        measure_speed(model, HALF, seed=seed, **sizes)
    assert torch.equal(torch.get_rng_state(), state_before)
    # Two runs of two models read a prompt and a token each.
    first, second, third = read[:8], read[8:16], read[16:]
    assert first == second != third
    assert first[:2] * 4 == first


@pytest.mark.parametrize("name", list(SMALL))
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(DataError, match=f"{name} must be at least 1, got 0"):
        measure_speed(tiny_model("llama"), HALF, **{**SMALL, name: 0})


@pytest.mark.parametrize(
    ("name", "longest"), [("gpt2", 128), ("bert", 128), ("roberta", 129), ("mpnet", 126)]
)
def test_more_tokens_than_position_embeddings_are_refused(name: str, longest: int) -> None:
    model = tiny_model(name)
    new = 1 if name == "gpt2" else 0
    measure_speed(model, HALF, prompt_tokens=longest - new, new_tokens=1, repeats=1)
    with pytest.raises(DataError, match=f"embeddings for {longest} positions, and .* need {longest + 1}"):
        measure_speed(model, HALF, prompt_tokens=longest - new + 1, new_tokens=1, repeats=1)


def test_rotary_positions_have_no_end() -> None:
    model = tiny_model("llama")
    assert model.config.max_position_embeddings == 128
    assert isinstance(measure_speed(model, HALF, prompt_tokens=200, new_tokens=1, repeats=1), SpeedComparison)


def test_a_patched_model_and_methods_that_do_not_fit_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(PlanError, match="allowed are 0 to 3"):
        measure_speed(model, LayerDrop(mlp=[7]), **SMALL)
    slimformer.patch(model, HALF)
    with pytest.raises(CalibrationError, match="unpatch first"):
        measure_speed(model, HALF, **SMALL)
    assert dropped(model) == {0: ["attention"], 2: ["attention"]}

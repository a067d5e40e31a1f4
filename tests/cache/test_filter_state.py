"""What a filter remembers: its own inputs and no more, in every place that a cache may be moved to."""

from __future__ import annotations

import torch
from tests.cache.test_cache_layouts import filters
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import slimformer
from slimformer.cache.filter_state import FilterState
from slow_rows import one_thread, outputs, small  # noqa: F401

LONG, TAPS = 1000, 3


def held(state: FilterState) -> int:
    """Bytes that a state keeps alive."""
    assert state.state is not None
    return state.state.untyped_storage().nbytes()


def test_a_long_prompt_is_not_kept_alive() -> None:
    state = FilterState(DynamicLayer(), TAPS)
    inputs = torch.randn(2, LONG, 32, generator=torch.Generator().manual_seed(0))
    state.extend(inputs)
    assert held(state) <= inputs.untyped_storage().nbytes() / 10
    for _ in range(3):
        state.extend(inputs[:, :1])
        assert held(state) <= inputs.untyped_storage().nbytes() / 5
    recording = FilterState(DynamicLayer(), TAPS)
    recording.activate_past_recording()
    recording.extend(inputs)
    recording.crop(-1)
    assert held(recording) <= inputs.untyped_storage().nbytes() / 10


def test_a_cache_with_filters_can_be_offloaded_and_fetched_back() -> None:
    model = slimformer.patch(small("llama"), filters([1, 2], TAPS))
    ids = torch.randint(3, 64, (2, 14), generator=torch.Generator().manual_seed(1))
    whole = outputs(model, {"input_ids": ids}, use_cache=False)
    cache, found = DynamicCache(config=model.config), []
    for start, end in ((0, 10), (10, 11), (11, 14)):
        step = {"input_ids": ids[:, start:end]}
        found.append(outputs(model, step, past_key_values=cache, use_cache=True))
        for layer in cache.layers:
            layer.offload()
        for layer in cache.layers:
            layer.prefetch()
    torch.testing.assert_close(torch.cat(found, 1), whole, atol=1e-4, rtol=0)

"""Steps over a cache that stays give what the model gives alone; on the CPU, replaying is calling again."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import slimformer
from slimformer import EarlyExit, LayerDrop, TempScale, TokenElimination
from slimformer.cache import room
from slimformer.cache.filter_state import FilterState
from slimformer.cache.steps import Step
from slimformer.changes.running_calls import PATCH
from slimformer.decoding import capture, rooms
from slimformer.decoding import stepping as stepping_module
from slimformer.errors import DataError
from slimformer.methods import LogNScale, RopeScaling, SelfExtend, WeightDelta
from tiny_models import DECODERS, tiny_model

NEW = 24
DELTA = WeightDelta({"3.mlp.down_proj.weight.added": torch.full((32, 48), 1e-3)})


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "_CAPTURES", {"cpu": lambda: True})


def prompts(rows: int = 3, tokens: int = 12, padded: int = 4) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    return ids * mask, mask


def generated(model: Any, given: tuple[Tensor, Tensor] | None = None, **options: Any) -> Any:
    ids, mask = prompts() if given is None else given
    chosen = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **chosen)


def stepping(model: Any) -> Any:
    return next(vars(m)[PATCH] for m in model.modules() if PATCH in vars(m)).reports["steps"]


@pytest.mark.parametrize("name", DECODERS)
def test_tokens_are_those_of_the_model_alone(name: str) -> None:
    model = tiny_model(name)
    expected = generated(model), generated(model, prompts(1, 7, 0))
    slimformer.patch(model)
    assert torch.equal(generated(model), expected[0])
    assert torch.equal(generated(model, prompts(1, 7, 0)), expected[1])
    # The first token is the prompt's, the second step is captured.
    assert (stepping(model).steps, stepping(model).captured) == (2 * (NEW - 2), 2)
    assert torch.equal(generated(model), expected[0])
    assert (stepping(model).steps, stepping(model).captured) == (3 * (NEW - 2) + 1, 2)


def fitted() -> LayerDrop:
    weights = {"attention.1.weight": torch.eye(32) * 0.1, "attention.1.bias": torch.zeros(32)}
    return LayerDrop(attention=[1], replace="filter", weights=weights)


@pytest.mark.parametrize(
    "method",
    [LayerDrop(attention=[0, 2], mlp=[1]), LayerDrop(block=[1]), fitted(), EarlyExit(3), TempScale(0.8), DELTA],
    ids=lambda method: type(method).__name__,
)  # fmt: skip
def test_with_a_plan_they_are_those_of_the_plan(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    with monkeypatch.context() as without:
        without.setattr(capture, "_CAPTURES", {})
        expected = generated(slimformer.patch(model, method))
    assert torch.equal(generated(slimformer.patch(model, method)), expected)
    assert stepping(model).steps == NEW - 2


@pytest.mark.parametrize(
    "options",
    [{"num_beams": 3}, {"do_sample": True}, {"num_return_sequences": 2, "do_sample": True, "temperature": 0.7},
     {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2}, {"prefill_chunk_size": 5}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_however_tokens_are_chosen(options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    torch.manual_seed(3)
    expected = generated(model, **options)
    slimformer.patch(model)
    torch.manual_seed(3)
    assert torch.equal(generated(model, **options), expected)
    assert stepping(model).steps > 10


def test_texts_end_one_by_one() -> None:
    model = tiny_model("llama")
    ends = generated(model)[1, 12 + 6].item()
    expected = generated(model, eos_token_id=ends)
    assert torch.equal(generated(slimformer.patch(model), eos_token_id=ends), expected)


def test_a_cache_that_grows_out_of_its_room_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_LEAST", 8)
    monkeypatch.setattr(rooms, "_AHEAD", 4)
    model = tiny_model("gemma2")
    expected = generated(model, max_new_tokens=80)
    slimformer.patch(model)
    assert torch.equal(generated(model, max_new_tokens=80), expected)
    assert 1 < stepping(model).captured < 6


def test_a_cache_that_is_returned_is_a_dynamic_one_of_its_own() -> None:
    for name in ("llama", "gemma2"):
        model = tiny_model(name)
        given = prompts(3, 12, 0)
        expected = generated(model, given, return_dict_in_generate=True)
        slimformer.patch(model)
        found = generated(model, given, return_dict_in_generate=True, output_logits=True)
        generated(model)
        caches = [getattr(out, "cache", None) or out.past_key_values for out in (expected, found)]
        assert type(caches[1]) is DynamicCache
        for own, alone in zip(caches[1].layers, caches[0].layers, strict=True):
            torch.testing.assert_close(own.keys, alone.keys)
            assert own.get_seq_length() == alone.get_seq_length()


@pytest.mark.parametrize(
    ("options", "why"),
    [({"cache_implementation": "static"}, "another than"), ({"use_cache": False}, "another than"),
     ({"output_attentions": True, "return_dict_in_generate": True}, "attentions")],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_cannot_be_replayed_runs_as_before_and_says_why(options: dict[str, Any], why: str) -> None:
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    given = prompts(1, 12, 0)
    expected = generated(model, given, **options)
    found = generated(slimformer.patch(model), given, **options)
    assert torch.equal(*(out if isinstance(out, Tensor) else out.sequences for out in (found, expected)))
    assert stepping(model).steps == 0
    assert why in slimformer.status(model).generation["steps"]


def test_a_cache_from_elsewhere_and_hooks_run_as_before() -> None:
    model = slimformer.patch(tiny_model("llama"))
    generated(model, past_key_values=DynamicCache(config=model.config))
    assert "handed in" in stepping(model).why_not
    seen: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(1))
    generated(model)
    assert "touched" in stepping(model).why_not
    assert len(seen) == NEW
    handle.remove()
    generated(model)
    assert stepping(model).steps == NEW - 2


# Texts of 8 and 12 tokens grow to 32 and 36: beyond what the model was trained for, and beyond a bucket.
@pytest.mark.parametrize(
    "method",
    [SelfExtend(4, 8, 16), SelfExtend(4, 8, 512), RopeScaling("linear", 4.0, trained_length=16),
     RopeScaling("ntk", 4.0, trained_length=10), RopeScaling("dynamic", 2.0, trained_length=14), LogNScale(9)],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_steps_that_depend_on_the_length_of_a_text(
    method: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights under which positions count.
    model = tiny_model("llama", initializer_range=0.3)
    plain = generated(model, **options)
    with monkeypatch.context() as without:
        without.setattr(capture, "_CAPTURES", {})
        expected = generated(slimformer.patch(model, method), **options)
    assert torch.equal(generated(slimformer.patch(model, method), **options), expected)
    assert torch.equal(expected, plain) == (method == SelfExtend(4, 8, 512))
    # At a bound some are launched.
    assert stepping(model).steps > NEW - 8


def test_a_text_that_grows_too_long_is_refused_in_a_step_too() -> None:
    model = slimformer.patch(tiny_model("llama"), RopeScaling("linear", 2.0, trained_length=10))
    with pytest.raises(DataError, match="21 tokens, and the limit is 20"):
        generated(model)
    assert stepping(model).steps > 4


def filtered(taps: int) -> LayerDrop:
    weights = torch.randn(32, taps * 32, generator=torch.Generator().manual_seed(1)) * 0.2
    fitted = {"attention.1.weight": weights, "attention.1.bias": torch.full((32,), 0.1)}
    return LayerDrop(attention=[1], replace="filter", taps=taps, weights=fitted)


@pytest.mark.parametrize("taps", [2, 3])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_a_filter_of_several_taps(
    taps: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", initializer_range=0.3)
    given = prompts(3, 12, 4), prompts(2, 2, 0), prompts(3, 70, 4)
    with monkeypatch.context() as without:
        without.setattr(capture, "_CAPTURES", {})
        slimformer.patch(model, filtered(taps))
        expected = [generated(model, each, **options) for each in given]
    slimformer.patch(model, filtered(taps))
    # A second time they begin with what an earlier text has left.
    for _ in range(2):
        assert all(map(torch.equal, [generated(model, each, **options) for each in given], expected))
    assert stepping(model).captured == 2
    assert stepping(model).steps > 4 * NEW


def test_a_cache_that_is_returned_keeps_the_inputs_of_its_filter() -> None:
    model = slimformer.patch(tiny_model("llama"), filtered(3))
    first = generated(model, prompts(1, 12, 0), return_dict_in_generate=True)
    cache = getattr(first, "cache", None) or first.past_key_values
    before = [layer.state.clone() for layer in cache.layers if isinstance(layer, FilterState)]
    generated(model, prompts(1, 9, 0))
    after = [layer.state for layer in cache.layers if isinstance(layer, FilterState)]
    assert all(map(torch.equal, before, after))
    assert len(before) == 1


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 9}], ids=str)
@pytest.mark.parametrize("given", [(3, 40, 7), (1, 30, 0)], ids=["padded", "alone"])
def test_behind_a_prompt_that_tokens_have_left(
    given: tuple[int, int, int], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, method = (
        tiny_model("llama", initializer_range=0.1),
        TokenElimination({1: 0.7, 2: 0.5}, scorer="norm", window=3, least=4),
    )
    with monkeypatch.context() as without:
        without.setattr(capture, "_CAPTURES", {})
        slimformer.patch(model, method)
        expected = [
            generated(model, prompts(*given), **options),
            generated(model, prompts(2, 5, 0), **options),
        ]
    slimformer.patch(model, method)
    for _ in range(2):
        found = [generated(model, prompts(*given), **options), generated(model, prompts(2, 5, 0), **options)]
        assert all(map(torch.equal, found, expected))
    # Where others had left, none have.
    with monkeypatch.context() as without:
        without.setattr(capture, "_CAPTURES", {})
        expected = [
            generated(
                slimformer.patch(tiny_model("llama", initializer_range=0.1)),
                prompts(given[0], 2, 0),
                **options,
            )
        ]
    assert torch.equal(generated(model, prompts(given[0], 2, 0), **options), expected[0])
    if "prefill_chunk_size" in options:
        assert "in several places" in slimformer.status(model).generation["steps"] or stepping(model).steps
    else:
        assert stepping(model).steps > 3 * NEW
        assert stepping(model).captured == 2


def test_new_weights_are_used() -> None:
    model = slimformer.patch(tiny_model("llama"))
    generated(model)
    torch.manual_seed(9)
    others = {key: torch.randn_like(value) * 0.1 for key, value in model.state_dict().items()}
    fresh = tiny_model("llama")
    fresh.load_state_dict(others)
    for assign in (False, True):
        model.load_state_dict(others, assign=assign)
        assert torch.equal(generated(model), generated(fresh))
    assert torch.equal(generated(copy.deepcopy(model)), generated(fresh))


def test_memory_is_given_back() -> None:
    def live() -> int:
        gc.collect()
        return sum(type(thing).__name__ == "Places" for thing in gc.get_objects())

    before, model = live(), tiny_model("llama")
    slimformer.patch(model)
    for batch in (1, 2, 3, 1, 2, 3) * 3:
        generated(model, prompts(batch, 12, 0))
        kept = live() - before
    assert kept == 3 * 4
    slimformer.unpatch(model)
    assert live() == before
    # What dropped attentions leave in the cache holds no room either.
    for _ in range(3):
        slimformer.patch(model, LayerDrop(attention=[0, 2]))
        generated(model)
    generated(model)
    assert stepping(model).captured == 1
    slimformer.unpatch(model)
    assert live() == before


@pytest.mark.parametrize("from_the_start", [True, False])
def test_where_memory_is_short_steps_are_launched(
    from_the_start: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_LEAST", 8)
    monkeypatch.setattr(rooms, "_AHEAD", 4)
    model = tiny_model("llama")
    expected = generated(model)
    slimformer.patch(model)
    # Bytes: of nothing, or of the first room and of no larger one.
    monkeypatch.setattr(rooms, "_free", lambda device: 0 if from_the_start else 3 * 4 * 2 * 2 * 8 * 4 * 17)
    assert torch.equal(generated(model), expected)
    assert "too little memory for" in slimformer.status(model).generation["steps"]
    assert (stepping(model).steps == 0) == from_the_start
    # There is some again.
    monkeypatch.undo()
    monkeypatch.setattr(capture, "_CAPTURES", {"cpu": lambda: True})
    assert torch.equal(generated(model), expected)
    assert "none in the last call" not in slimformer.status(model).generation["steps"]


def test_a_step_that_cannot_be_captured_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    expected = generated(model)

    def fails(step: Step) -> None:
        raise ZeroDivisionError("a kernel that does not compile")

    monkeypatch.setattr(Step, "begin", fails)
    assert torch.equal(generated(slimformer.patch(model)), expected)
    assert "cannot be captured (a kernel that" in slimformer.status(model).generation["steps"]


def test_a_wrong_replay_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    expected = generated(model)
    slimformer.patch(model)
    monkeypatch.setattr(Step, "begin", lambda self: self.ranges[:, 1].fill_(3))
    assert torch.equal(generated(model), expected)
    assert "gives something else" in slimformer.status(model).generation["steps"]


def test_what_differs_no_more_than_the_order_of_additions_is_replayed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stepping_module, "_TOLERANCE", {})
    model = tiny_model("llama", initializer_range=0.3, num_hidden_layers=8)
    expected = generated(model)
    assert torch.equal(generated(slimformer.patch(model)), expected)
    assert stepping(model).steps == NEW - 2
    slimformer.unpatch(model)
    # It does differ.
    monkeypatch.setattr(stepping_module, "_ROUNDINGS", 0.0)
    assert torch.equal(generated(slimformer.patch(model)), expected)
    assert stepping(model).steps == 0

"""SelfExtend gives every pair of tokens the published relative position, in prompt, chunks and decode alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import slimformer
import slow_rows
from slimformer import LayerDrop, Plan, SelfExtend, TempScale, TokenElimination
from slimformer.errors import DataError, PlanError, UnsupportedModelError
from slimformer.methods.elimination.random_keep import RandomKeep
from slow_rows import arguments, error, kept, one_thread, outputs, positions, slowly  # noqa: F401
from slow_scores import relative_positions, slow_scores, slow_self_extend
from tiny_models import DECODERS

ROTARY = [*(name for name in DECODERS if name != "gpt2"), "modernbert"]
# Lengths that are multiples of nothing, on either side of the trained length.
TOKENS, TRAINED = 61, 23
TEXTS = {
    "whole": [(0, 61), (0, 61)],
    "left": [(8, 53), (41, 20), (0, 61)],
    "right": [(0, 53), (0, 20), (0, 61)],
    "mixed": [(5, 50), (3, 24)],
}
METHOD = SelfExtend(4, 7, TRAINED)
CLOSE = 1e-5


def small(name: str, **overrides: object) -> PreTrainedModel:
    """The small model, of which some layers see all of a text."""
    mixed = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "gemma3_text" else {}
    return slow_rows.small(name, **{**mixed, **overrides})


def expected(
    model: PreTrainedModel, name: str, given: dict[str, Tensor], method: SelfExtend, **more: Any
) -> Tensor:
    """What the model gives with a full matrix of scores."""
    rules = (method.group_size, method.window, method.trained_length or 0)
    score = slow_self_extend(model, given["attention_mask"], name in DECODERS, *rules, **more)
    with slow_scores(model, score):
        return outputs(model, given)


def test_the_published_example() -> None:
    place = torch.arange(10)
    relative = relative_positions(place[:, None], place, group=2, window=4)
    assert relative[9].tolist() == [6, 6, 5, 5, 4, 4, 3, 2, 1, 0]
    assert relative[0].tolist() == [0, -1, -2, -3, -4, -4, -5, -5, -6, -6]


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("name", ROTARY)
def test_every_pair_has_its_relative_position(name: str, texts: str) -> None:
    model, given = small(name), arguments(name, TEXTS[texts], TOKENS)
    dense, mask = outputs(model, given), given["attention_mask"]
    slow = expected(model, name, given, METHOD)
    with slimformer.patched(model, METHOD):
        actual = outputs(model, given)
    assert error(actual, slow, mask) <= CLOSE
    assert error(actual, dense, mask) > 1e-2
    assert torch.equal(outputs(model, given), dense)


@pytest.mark.parametrize(("group", "window", "trained"), [
    (5, 7, 23), (2, 1, 40), (61, 22, 23), (1, 5, 60), (4, 13, 29),
])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "phi", "modernbert"])
def test_any_group_and_window(name: str, group: int, window: int, trained: int) -> None:
    model, given = small(name), arguments(name, TEXTS["mixed"], TOKENS)
    method = SelfExtend(group, window, trained)
    slow = expected(model, name, given, method)
    slimformer.patch(model, method)
    assert error(outputs(model, given), slow, given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "modernbert"])
def test_every_attention_function(name: str, attention: str) -> None:
    model = small(name, attn_implementation=attention)
    for texts in ("whole", "left"):
        given = arguments(name, TEXTS[texts], TOKENS)
        slow = expected(model, name, given, METHOD)
        with slimformer.patched(model, METHOD):
            assert error(outputs(model, given), slow, given["attention_mask"]) <= CLOSE


@pytest.mark.parametrize("cache", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi", "gemma3_text"])
def test_chunks_and_decode_steps_equal_one_pass(name: str, cache: type[Any]) -> None:
    model, given = small(name), arguments(name, [(8, 53), (41, 20), (0, 61)], TOKENS)
    slimformer.patch(model, METHOD)
    mask, whole = given["attention_mask"], outputs(model, given, use_cache=False)
    options = {"max_cache_len": 70} if cache is StaticCache else {}
    past, found = cache(config=model.config, **options), []
    for start, end in ((0, 17), (17, 18), (18, 45), (45, 46), (46, 47), (47, 61)):
        step = {
            "input_ids": given["input_ids"][:, start:end],
            "attention_mask": mask[:, :end],
            "position_ids": given["position_ids"][:, start:end],
        }
        found.append(outputs(model, step, past_key_values=past, use_cache=True))
    assert error(torch.cat(found, 1), whole, mask) <= CLOSE


def test_texts_are_continued_alike_alone_and_in_a_batch() -> None:
    model, given = (
        slimformer.patch(small("llama"), METHOD),
        arguments("llama", [(8, 37), (30, 15), (0, 45)], 45),
    )
    given.pop("position_ids")
    options: dict[str, Any] = {
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    together = model.generate(**given, **options)[:, 45:]
    for row, (begin, _) in enumerate([(8, 37), (30, 15), (0, 45)]):
        alone = model.generate(given["input_ids"][row : row + 1, begin:], **options)
        assert torch.equal(together[row], alone[0, -16:])


@pytest.mark.parametrize("name", ROTARY)
def test_short_texts_are_bit_identical_whatever_ran_before(name: str) -> None:
    model, short = small(name), arguments(name, [(0, TRAINED), (0, TRAINED)], TRAINED)
    long = arguments(name, TEXTS["left"], TOKENS)
    dense = outputs(model, short)
    slimformer.patch(model, METHOD)
    assert torch.equal(outputs(model, short), dense)
    outputs(model, long)
    assert torch.equal(outputs(model, short), dense)


def test_an_embedding_ignores_batch_mates() -> None:
    model = slimformer.patch(small("modernbert"), METHOD)
    given = arguments("modernbert", [(0, 20), (0, 40), (0, 61)], TOKENS)
    together = outputs(model, given)
    for row, length in enumerate((20, 40, 61)):
        alone = outputs(model, {key: value[row : row + 1, :length] for key, value in given.items()})
        assert error(together[row : row + 1, :length], alone) <= CLOSE


@pytest.mark.parametrize("name", ["llama", "modernbert"])
def test_it_composes_with_temperatures_dropped_sublayers_and_chosen_rows(name: str) -> None:
    model, given = small(name), arguments(name, TEXTS["mixed"], TOKENS)
    mask, keep = given["attention_mask"], RandomKeep(0.5, seed=3)
    slow = expected(model, name, given, METHOD, tau=0.6) if name == "llama" else None
    if slow is not None:
        slimformer.patch(model, TempScale(0.6), METHOD)
        assert error(outputs(model, given), slow, mask) <= CLOSE
    slimformer.unpatch(model)
    with slowly(model, kept(keep, positions(mask))):
        slow = expected(model, name, given, METHOD)
    slimformer.patch(model, keep, METHOD)
    assert error(outputs(model, given), slow, mask) <= CLOSE
    slimformer.patch(model, LayerDrop(attention=[2], mlp=[1]), METHOD)
    assert slimformer.status(model)[2]["attention"] == "dropped"
    assert error(outputs(model, given), slow, mask) > 1e-2


def test_undo_leaves_nothing_behind() -> None:
    model, given = small("llama"), arguments("llama", TEXTS["left"], TOKENS)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    state, dense = dict(model.state_dict()), outputs(model, given)
    slimformer.patch(model, METHOD)
    outputs(model, given)
    assert list(model.state_dict()) == list(state)
    slimformer.unpatch(model)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(outputs(model, given), dense)


def test_plans_carry_it_and_status_reports_its_reach(tmp_path: Path) -> None:
    model, given = small("modernbert"), arguments("modernbert", TEXTS["left"], TOKENS)
    slow = outputs(slimformer.patch(model, METHOD), given)
    Plan([METHOD, TempScale(0.9)]).save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path).methods == (METHOD, TempScale(0.9))
    assert torch.equal(outputs(slimformer.patch(model, Plan([METHOD])), given), slow)
    note = "text rows, SelfExtend(group_size=4, window=7), up to 71 tokens"
    assert [layer["attention"] for layer in slimformer.status(model).values()] == [
        note,
        *["text rows"] * 2,
        note,
    ]


@pytest.mark.parametrize(
    ("tokens", "group", "window"), [(129, 3, 64), (256, 3, 64), (512, 5, 32), (1024, 9, 16)]
)
def test_group_and_window_by_the_published_rule(tokens: int, group: int, window: int) -> None:
    method = SelfExtend.for_length(small("llama"), tokens)
    assert (method.group_size, method.window) == (group, window)
    assert (128 - window) * group + window >= tokens
    assert SelfExtend.for_length(small("llama"), 60, trained_length=20) == SelfExtend(4, 6, 20)
    with pytest.raises(PlanError, match="trained for 128 tokens and reads 128 without"):
        SelfExtend.for_length(small("llama"), 128)


@pytest.mark.parametrize("settings", [(0, 8), (2, 0), (2.0, 8), (2, True), (2, 8, 1), ("3", 8)])
def test_settings_that_make_no_sense_are_refused(settings: Any) -> None:
    with pytest.raises(PlanError, match="takes a whole number from"):
        SelfExtend(*settings)


@pytest.mark.parametrize(("name", "methods", "kind", "message"), [
    ("llama", [SelfExtend(2, 128)], PlanError, "leaves no position for far tokens.*128"),
    ("llama", [METHOD, SelfExtend(2, 8)], PlanError, "both change positions"),
    ("llama", [METHOD, TokenElimination({1: 0.5})], PlanError, "Use RopeScaling"),
    ("bert", [METHOD], UnsupportedModelError, "has no rotary_emb.*PositionInterpolation"),
    ("gpt2", [METHOD], UnsupportedModelError, "has no rotary_emb"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(
    name: str, methods: list[Any], kind: type[Exception], message: str
) -> None:
    model = small(name)
    before = {path: set(vars(module)) for path, module in model.named_modules()}
    with pytest.raises(kind, match=message):
        slimformer.patch(model, *methods)
    assert {path: set(vars(module)) for path, module in model.named_modules()} == before


def test_models_that_see_a_window_or_stretch_by_themselves_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="all of its layers see a sliding window"):
        slimformer.patch(small("mistral", sliding_window=8), METHOD)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        slimformer.patch(small("llama", rope_parameters=dynamic), METHOD)


def test_texts_that_cannot_be_placed_are_refused() -> None:
    model, long = slimformer.patch(small("llama"), METHOD), arguments("llama", [(0, 61)], TOKENS)
    with pytest.raises(
        DataError, match=r"61 tokens, and the limit is 53.*SelfExtend\(group_size=4, window=9\)"
    ):
        outputs(slimformer.patch(model, SelfExtend(2, 1, 27)), long)
    slimformer.patch(model, METHOD)
    packed = {"input_ids": long["input_ids"], "position_ids": (torch.arange(TOKENS) % 40)[None]}
    with pytest.raises(DataError, match="several texts are packed into one row"):
        outputs(model, packed)
    with pytest.raises(DataError, match="cu_seq_lens_q"):
        outputs(model, packed, cu_seq_lens_q=torch.tensor([0, 40, 61]))
    long["attention_mask"][0, 30] = 0
    with pytest.raises(DataError, match="hides tokens inside a text"):
        outputs(model, long)

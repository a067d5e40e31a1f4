"""A cache is continued by what filled it, or refused: no layer reads what another layer, or another plan, left."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, DynamicLayer

import slimformer
from slimformer import EarlyExit, LayerDrop, TempScale, TokenElimination
from slimformer.errors import PlanError
from slimformer.methods.rope_scaling import RopeScaling
from slow_rows import arguments, one_thread, small  # noqa: F401
from tiny_models import tiny_model

PROMPT, TOKENS = 16, 22
GIVEN = arguments("llama", [(0, TOKENS), (5, TOKENS - 5)], TOKENS)
Method = Any


def filters(attention: list[int], taps: int) -> LayerDrop:
    """Attentions replaced by filters that count."""
    generator = torch.Generator().manual_seed(3)
    weights = {}
    for index in attention:
        weights[f"attention.{index}.weight"] = torch.randn(32, 32 * taps, generator=generator) * 0.1
        weights[f"attention.{index}.bias"] = torch.zeros(32)
    return LayerDrop(attention=attention, replace="filter", taps=taps, weights=weights)


PLANS: dict[str, tuple[Method, ...] | None] = {
    "dense": None,
    "plain": (),
    "MLPs dropped": (LayerDrop(mlp=[1, 2]),),
    "TempScale": (TempScale(tau=0.9),),
    "first dropped": (LayerDrop(attention=[0]),),
    "two dropped": (LayerDrop(attention=[1, 2]),),
    "last dropped": (LayerDrop(attention=[3]),),
    "early exit": (EarlyExit(layer=2),),
    "filter": (filters([1], taps=3),),
    "longer filter": (filters([1], taps=4),),
    "tokens leave": (TokenElimination({2: 0.5}, sink=1, window=2, least=4),),
}
# Every attention runs, with the keys of all tokens in its own slot.
ALIKE = {"dense", "plain", "MLPs dropped", "TempScale"}


def as_planned(model: PreTrainedModel, plan: str) -> None:
    methods = PLANS[plan]
    if methods is None:
        slimformer.unpatch(model)
    else:
        slimformer.patch(model, *(methods or (slimformer.methods.unpadding.Unpadding(),)))


def step(model: PreTrainedModel, cache: Cache | None, start: int, end: int) -> Tensor:
    given = {
        "input_ids": GIVEN["input_ids"][:, start:end],
        "attention_mask": GIVEN["attention_mask"][:, :end],
        "position_ids": GIVEN["position_ids"][:, start:end],
    }
    with torch.no_grad():
        return model(**given, past_key_values=cache, use_cache=cache is not None).logits


def dynamic(model: PreTrainedModel) -> Cache:
    return DynamicCache(config=model.config)


def static(model: PreTrainedModel) -> Cache:
    return StaticCache(config=model.config, max_cache_len=32)


# What leaves a static cache is checked in test_eliminated_caches; some crossings are enough to see that slots object.
CROSSINGS = [
    *((dynamic, before, after) for before in PLANS for after in PLANS),
    *((static, before, after) for before in ("dense", "first dropped", "filter") for after in [*PLANS][:-1]),
    *((static, before, "dense") for before in [*PLANS][:-1]),
]


@pytest.mark.parametrize(("make", "before", "after"), CROSSINGS)
def test_a_cache_of_another_layout_is_refused(make: Callable[..., Cache], before: str, after: str) -> None:
    model = small("llama")
    cache = make(model)
    as_planned(model, before)
    step(model, cache, 0, PROMPT)
    as_planned(model, after)
    readable = before == after or (before in ALIKE and after in {*ALIKE, "tokens leave"})
    if readable:
        for start in range(PROMPT, TOKENS):
            assert bool(step(model, cache, start, start + 1).isfinite().all())
        return
    with pytest.raises(PlanError, match="new cache"):
        step(model, cache, PROMPT, PROMPT + 1)


@pytest.mark.parametrize("make", [dynamic, static])
def test_a_cache_of_the_dense_model_serves_a_plain_patch_and_back(make: Callable[..., Cache]) -> None:
    model = small("llama")
    whole, cache = step(model, None, 0, TOKENS), make(model)
    found = [step(model, cache, 0, PROMPT)]
    for start in range(PROMPT, TOKENS):
        as_planned(model, "plain" if start % 2 else "dense")
        found.append(step(model, cache, start, start + 1))
    real = GIVEN["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize("plan", ["first dropped", "two dropped", "filter"])
def test_a_plan_reads_its_own_cache_after_copies_and_a_second_patch(
    plan: str, make: Callable[..., Cache]
) -> None:
    model = small("llama")
    as_planned(model, plan)
    whole, cache = step(model, None, 0, TOKENS), make(model)
    found = [step(model, cache, 0, PROMPT)]
    for start in range(PROMPT, TOKENS):
        # A copy per turn, and the same plan put on anew.
        cache = copy.deepcopy(cache)
        slimformer.unpatch(model)
        as_planned(model, plan)
        found.append(step(model, cache, start, start + 1))
    real = GIVEN["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("change", ["reorder", "repeat", "select", "crop"])
def test_a_changed_cache_still_knows_whose_it_is(change: str) -> None:
    model = small("llama")
    as_planned(model, "two dropped")
    cache = dynamic(model)
    step(model, cache, 0, PROMPT)
    if change == "reorder":
        cache.reorder_cache(torch.tensor([1, 0]))
    elif change == "repeat":
        cache.batch_repeat_interleave(1)
    elif change == "select":
        cache.batch_select_indices(torch.tensor([0, 1]))
    else:
        cache.crop(-1)
    start = cache.get_seq_length()
    step(model, cache, start, start + 1)
    as_planned(model, "plain")
    with pytest.raises(PlanError, match="new cache"):
        step(model, cache, start + 1, start + 2)


def _empties() -> bool:
    """Whether a dynamic cache that is reset holds no tokens."""
    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4), 0)
    cache.reset()
    return cache.get_seq_length() == 0


def _crops_nothing() -> bool:
    """Whether tokens can be taken back from a slot that was never filled."""
    try:
        DynamicLayer().crop(-1)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("after", ["dense", "plain", "first dropped", "longer filter"])
@pytest.mark.parametrize("before", ["dense", "first dropped", "two dropped", "filter"])
@pytest.mark.parametrize("make", [dynamic, static])
def test_a_reset_cache_is_anybodys(make: Callable[..., Cache], before: str, after: str) -> None:
    if make is dynamic and not _empties():
        pytest.skip(
            "this transformers zeroes the keys of a dynamic cache that is reset, and counts them still"
        )
    model = small("llama")
    cache = make(model)
    as_planned(model, before)
    step(model, cache, 0, PROMPT)
    cache.reset()
    as_planned(model, after)
    whole = step(model, None, 0, TOKENS)
    found = [step(model, cache, 0, PROMPT)]
    found += [step(model, cache, start, start + 1) for start in range(PROMPT, TOKENS)]
    real = GIVEN["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(found, 1)[real], whole[real], atol=1e-4, rtol=0)


def test_keys_that_were_turned_are_read_by_the_scaling_that_turned_them() -> None:
    model, long = small("llama"), RopeScaling("linear", 3.0, trained_length=8)
    for before, after in (
        ((), (long,)),
        ((long,), ()),
        ((long,), (RopeScaling("linear", 4.0, trained_length=8),)),
    ):
        cache = dynamic(model)
        slimformer.patch(model, *(before or (TempScale(tau=1.0),)))
        step(model, cache, 0, PROMPT)
        slimformer.patch(model, *(after or (TempScale(tau=1.0),)))
        with pytest.raises(PlanError, match="new cache"):
            step(model, cache, PROMPT, PROMPT + 1)
    # Up to the trained length no key is turned by other angles.
    cache = dynamic(model)
    slimformer.unpatch(model)
    step(model, cache, 0, 6)
    slimformer.patch(model, long)
    step(model, cache, 6, PROMPT)


def test_generate_under_one_plan_continues_a_conversation_and_under_another_refuses() -> None:
    model = small("llama")
    as_planned(model, "two dropped")
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache, ids = dynamic(model), GIVEN["input_ids"][:1]
    first = model.generate(ids[:, :8], past_key_values=cache, max_new_tokens=4, **options)
    more = torch.cat([first, ids[:, 8:12]], 1)
    expected = model.generate(more, max_new_tokens=4, **options)
    assert torch.equal(model.generate(more, past_key_values=cache, max_new_tokens=4, **options), expected)
    as_planned(model, "first dropped")
    with pytest.raises(PlanError, match="new cache"):
        model.generate(
            torch.cat([expected, ids[:, 12:]], 1), past_key_values=cache, max_new_tokens=4, **options
        )


def test_a_learned_prefix_is_refused_where_its_layers_moved_and_right_where_not() -> None:
    peft = pytest.importorskip("peft")
    base = small("llama")
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(base, config).eval()
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    given = {"input_ids": GIVEN["input_ids"], "attention_mask": GIVEN["attention_mask"]}
    with torch.no_grad():
        dense = model(**given).logits
        slimformer.patch(model, slimformer.methods.unpadding.Unpadding())
        real = GIVEN["attention_mask"].bool()
        torch.testing.assert_close(model(**given).logits[real], dense[real], atol=1e-4, rtol=0)
        slimformer.patch(model, LayerDrop(attention=[1]))
        with pytest.raises(PlanError, match="learned prefix"):
            model(**given)
    slimformer.unpatch(model)


def test_a_compiled_model_fills_a_cache_that_steps_outside_the_graph_read() -> None:
    torch.compiler.reset()
    model = tiny_model("llama")
    slimformer.patch(model, LayerDrop(attention=[0, 2]))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    whole, cache = step(model, None, 0, TOKENS), static(model)
    step(compiled, cache, 0, PROMPT)
    found = torch.cat([step(model, cache, start, start + 1) for start in range(PROMPT, TOKENS)], 1)
    torch.testing.assert_close(found, whole[:, PROMPT:], atol=1e-4, rtol=0)


@pytest.mark.skipif(
    not _crops_nothing(), reason="this transformers takes no tokens back from slots that hold none"
)
def test_a_draft_that_exits_early_runs_beside_dropped_attentions() -> None:
    options: dict[str, Any] = {
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "max_new_tokens": 8,
    }
    ids = GIVEN["input_ids"][:1]
    for methods in (
        (LayerDrop(attention=[1]),), (LayerDrop(block=[1, 2]),), (filters([1, 2], taps=3),), (filters([0], taps=2),),
    ):  # fmt: skip
        model = slimformer.patch(small("llama"), *methods)
        expected = model.generate(ids, **options)
        for layers in (1, 2, 3):
            assert torch.equal(model.generate(ids, assistant_early_exit=layers, **options), expected)

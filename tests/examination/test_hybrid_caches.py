"""Caches whose slots are not all alike: lengths, states and index keys stay right whichever layers are dropped."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import slimformer
from slimformer import LayerDrop
from slimformer.cache.slots import compact_slots, counting_slot
from slimformer.calls.layer_calls import cache_argument
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.model.anatomy import find_anatomy
from sweep.classes import Family
from sweep.models import build
from sweep.run import every
from sweep.subject import batch, continued, error, given, outputs, real, steps

# State-space and attention in one layer; convolutions and sliding windows first; no linear one.
SECOND_TIER = ["falcon_h1", "lfm3", "diffusion_gemma_text", "muse_spark_text"]
# Linear attentions, convolutions and Mamba beside attentions.
FIRST_TIER = ["qwen3_next", "lfm2_moe", "jamba", "bailing_hybrid"]
LIMIT = 1e-4


@functools.lru_cache
def family(name: str) -> Family:
    known = every()
    if name not in known:
        pytest.skip(f"this version of transformers has no {name}")
    return known[name]


@functools.lru_cache
def built(name: str) -> PreTrainedModel:
    return build(family(name))


@contextmanager
def dropped(name: str, drop: LayerDrop) -> Iterator[PreTrainedModel]:
    with slimformer.patched(built(name), drop):
        yield built(name)


def through(model: PreTrainedModel, cache: object, ids: Tensor, begin: int, end: int) -> Tensor:
    """The outputs of some tokens, whose cache holds those before."""
    mask = torch.ones_like(ids[:, :end])
    return outputs(
        model, {"input_ids": ids[:, begin:end], "attention_mask": mask, cache_argument(model): cache}
    )


def reset_empties() -> bool:
    """Whether resetting a cache empties it, as it does in newer versions of transformers."""
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2, 1), 0)
    cache.reset()
    return cache.get_seq_length() == 0


@pytest.mark.parametrize("name", [*FIRST_TIER, *SECOND_TIER])
def test_any_token_mixer_can_be_dropped_and_cached_steps_are_those_of_one_pass(name: str) -> None:
    model = built(name)
    types = find_anatomy(model).layer_types
    dense = steps(family(name), model)
    drops = [LayerDrop(attention=[i]) for i in range(len(types))]
    for drop in [*drops, LayerDrop(block=[0, 1])]:
        with dropped(name, drop):
            found = steps(family(name), model)
            assert error(found, continued(family(name), model)) <= LIMIT, drop
            assert error(found, dense) > 1e-3, drop


@pytest.mark.parametrize("name", [*FIRST_TIER, *SECOND_TIER])
def test_dropping_every_attention_that_counts_is_right_or_refused(name: str) -> None:
    types = find_anatomy(built(name)).layer_types
    counting = [i for i, kind in enumerate(types) if "linear" not in kind and kind != "conv"]
    drop = LayerDrop(attention=counting)
    if name in FIRST_TIER:
        with pytest.raises(PlanError, match="positions are counted"):
            slimformer.patch(built(name), drop)
        return
    with dropped(name, drop) as model:
        assert error(steps(family(name), model), continued(family(name), model)) <= LIMIT


@pytest.mark.parametrize("name", ["muse_spark_text", "falcon_h1"])
def test_a_static_cache_counts_the_tokens_of_a_dropped_first_attention(name: str) -> None:
    ids, _ = batch("none")
    with dropped(name, LayerDrop(attention=[0])) as model:
        expected = outputs(model, {"input_ids": ids, "use_cache": False})
        cache = StaticCache(config=model.config, max_cache_len=32)
        found = [through(model, cache, ids, b, e) for b, e in [(0, 20), (20, 21), (21, 24)]]
        assert error(torch.cat(found, 1), expected) <= LIMIT


@pytest.mark.parametrize("name", ["muse_spark_text", "diffusion_gemma_text"])
def test_a_count_follows_the_cache_that_is_cropped_reordered_selected_and_reset(name: str) -> None:
    ids, _ = batch("none")
    with dropped(name, LayerDrop(attention=[0])) as model:
        expected = through(model, DynamicCache(config=model.config), ids, 0, 24)
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        through(model, cache, ids, 0, 22)
        cache.crop(-3)
        assert cache.get_seq_length() == 19
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        assert error(through(model, cache, ids[order], 19, 23), expected[order, 19:23]) <= LIMIT
        cache.crop(0)
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
        twice = ids[order][[1, 1]]
        assert error(through(model, cache, twice, 23, 24), expected[order][[1, 1], 23:]) <= LIMIT
        cache.reset()
        if reset_empties():
            assert cache.get_seq_length() == 0
            assert error(through(model, cache, ids, 0, 24), expected) <= LIMIT


def test_a_cache_with_counts_is_refused_by_the_unpatched_model_until_it_is_reset() -> None:
    ids, _ = batch("none")
    model = built("muse_spark_text")
    dense = through(model, DynamicCache(config=model.config), ids, 0, 24)
    cache = DynamicCache(config=model.config)
    with dropped("muse_spark_text", LayerDrop(attention=[1])):
        through(model, cache, ids, 0, 20)
    with pytest.raises(PlanError, match="patched differently"):
        through(model, cache, ids, 20, 24)
    if reset_empties():
        cache.reset()
        assert error(through(model, cache, ids, 0, 24), dense) <= LIMIT


def test_positions_are_counted_in_the_first_slot_that_knows_tokens() -> None:
    types = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
    assert counting_slot(types) == 1
    assert compact_slots(types, [0, 2]) == [0, 1, 2, 3]
    assert compact_slots(types, [1]) == [0, 3, 2, 1]
    with pytest.raises(PlanError, match="every attention of type 'full_attention'"):
        compact_slots(types, [1, 3])


@pytest.mark.parametrize("name", ["axk2", "deepseek_v32"])
def test_index_keys_move_with_the_keys_that_they_choose(name: str) -> None:
    model = built(name)
    layer = find_anatomy(model).layers[1]
    if slimformer.support(model).tier != "rows":
        pytest.skip("in this version of transformers, tokens of this model see padding")
    hook = layer.self_attn.register_forward_hook(lambda _m, _a, out: (torch.zeros_like(out[0]), *out[1:]))
    expected = steps(family(name), model)
    hook.remove()
    with dropped(name, LayerDrop(attention=[1])):
        assert error(steps(family(name), model), expected) <= LIMIT


@pytest.mark.parametrize("name", ["rembert:decoder", "roc_bert:decoder", "megatron-bert:decoder"])
def test_a_decoder_that_could_attend_to_an_encoder_keeps_its_own_cache_right(name: str) -> None:
    # Older versions of transformers give these models other positions in steps than in one pass.
    agrees = error(steps(family(name), built(name)), continued(family(name), built(name))) <= LIMIT
    for drop in (LayerDrop(attention=[0]), LayerDrop(attention=[1], mlp=[2])):
        with dropped(name, drop) as model:
            arguments = given(family(name), model, "none")
            whole, alone = outputs(model, arguments), outputs(model, {**arguments, "use_cache": False})
            assert error(whole, alone) <= LIMIT
            if agrees:
                assert error(steps(family(name), model), continued(family(name), model)) <= LIMIT


def test_a_mixer_whose_state_goes_through_the_layers_above_is_not_dropped() -> None:
    with pytest.raises(UnsupportedModelError, match="returns beside its output goes to the layers above"):
        slimformer.patch(built("rwkv"), LayerDrop(attention=[1]))


@pytest.mark.parametrize("drop", [LayerDrop(attention=[1]), LayerDrop(block=[1])], ids=["attention", "block"])
def test_a_state_that_its_stack_takes_from_every_layer_is_not_dropped(drop: LayerDrop) -> None:
    with pytest.raises(UnsupportedModelError, match="keeps states that layers return"):
        slimformer.patch(built("xlstm"), drop)


@pytest.mark.parametrize("name", FIRST_TIER)
def test_a_linear_attention_gets_its_cache_under_its_own_name(name: str) -> None:
    expected = steps(family(name), built(name))
    with slimformer.patched(built(name)):
        assert error(steps(family(name), built(name)), expected) <= LIMIT


def test_a_part_that_its_stack_adds_to_a_residual_is_no_layer_to_drop() -> None:
    with pytest.raises(UnsupportedModelError, match="adds what it returns to a residual of its own"):
        slimformer.patch(built("xlm:decoder"), LayerDrop(block=[1]))


def test_a_layer_whose_parts_take_more_arguments_is_left_to_its_own_code() -> None:
    model, arguments = built("xmod"), given(family("xmod"), built("xmod"), "left")
    support, dense = slimformer.support(model), outputs(model, arguments)
    assert support.tier == "sublayers"
    assert "could not be run one after the other: TypeError" in support.reason
    with slimformer.patched(model):
        assert torch.equal(outputs(model, arguments), dense)
    with dropped("xmod", LayerDrop(attention=[1])):
        assert error(outputs(model, arguments), dense, real("left")) > 1e-3


@pytest.mark.parametrize("name", ["convbert", "nystromformer", "deepseek_v32"])
@pytest.mark.parametrize("layout", ["left", "right"])
def test_where_text_sees_padding_the_plain_patch_computes_padding(name: str, layout: str) -> None:
    model, arguments = built(name), given(family(name), built(name), layout)
    dense = outputs(model, arguments)
    with slimformer.patched(model):
        assert error(outputs(model, arguments), dense, real(layout)) <= LIMIT


def test_indices_of_keys_that_layers_share_are_not_lost() -> None:
    name = "glm_moe_dsa"
    support = slimformer.support(built(name))
    assert support.tier == "sublayers"
    assert "hands more than the residual" in support.reason
    model, arguments = built(name), given(family(name), built(name), "left")
    dense = outputs(model, arguments)
    with slimformer.patched(model):
        assert torch.equal(outputs(model, arguments), dense)

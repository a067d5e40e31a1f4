"""What a dropped sublayer leaves behind is computed alike in one pass and step by step, for every kind of cache."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import slimformer
from slimformer import LayerDrop
from slimformer.cache.filter_state import FilterState
from slimformer.errors import PlanError
from slimformer.model.anatomy import find_anatomy
from slimformer.runtime.layer import LayerExecutor
from tiny_models import DECODERS, ENCODERS, tiny_model

TAPS = 3


def filters(model: nn.Module, replace: str = "filter", taps: int = TAPS, **dropped: list[int]) -> LayerDrop:
    """Random replacements of the size that attention outputs have, so that a mistake in them shows."""
    hidden = find_anatomy(model).stack.config.hidden_size
    generator = torch.Generator().manual_seed(7)
    weights = {}
    for kind, layers in dropped.items():
        for index in layers:
            weights[f"{kind}.{index}.bias"] = torch.randn(hidden, generator=generator) * 0.3
            weights[f"{kind}.{index}.weight"] = torch.randn(hidden, (taps if kind == "attention" else 1) * hidden,
                                                              generator=generator) * 0.1  # fmt: skip
    return LayerDrop(**dropped, replace=replace, taps=taps, weights=weights)


def ids(rows: int = 2, tokens: int = 30) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, tokens: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=tokens, **kwargs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def obvious(x: Tensor, drop: LayerDrop, name: str, causal: bool) -> Tensor:
    """The filter's definition, a token and a tap at a time."""
    weight, bias, hidden = drop.weights[f"{name}.weight"], drop.weights[f"{name}.bias"], x.shape[-1]
    out = bias.expand_as(x).clone()
    for t in range(x.shape[1]):
        for tap in range(drop.taps):
            source = t - (drop.taps - 1 if causal else drop.taps // 2) + tap
            if 0 <= source < x.shape[1]:
                out[:, t] += x[:, source] @ weight[:, tap * hidden : (tap + 1) * hidden].T
    return out


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt_neox", "bert", "distilbert", "modernbert"])
def test_a_filter_adds_what_its_definition_says(name: str, taps: int) -> None:
    model = tiny_model(name)
    anatomy = find_anatomy(model)
    drop = filters(model, taps=taps, attention=[1])
    layer = anatomy.layers[1]
    with slimformer.patched(model, drop), torch.no_grad():
        states = model(input_ids=ids(), output_hidden_states=True).hidden_states
        executor = LayerExecutor(layer, anatomy.structure)
        x = states[1]
        y = obvious(executor.normed("attention", x), drop, "attention.1", anatomy.causal)
        if executor.parallel:
            expected = x + y + executor.difference("mlp", x, {})
        else:
            expected = x + y + executor.difference("mlp", x + y, {})
    torch.testing.assert_close(states[2], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_cached_steps_equal_uncached_ones(name: str, padding: str, static: bool) -> None:
    model = tiny_model(name)
    tokens, mask = ids(2, 30), torch.ones(2, 30, dtype=torch.long)
    if padding == "left":
        mask[0, :5] = 0
    elif padding == "right":
        mask[0, 18:22] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    slimformer.patch(model, filters(model, attention=[0, 3], mlp=[1], taps=TAPS if padding != "none" else 4))
    full = logits(model, tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    cache = StaticCache(model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    steps = []
    for begin, end in [(0, 22), (22, 23), (23, 24), (24, 30)]:
        given = mask[:, :end]
        if static:
            given = torch.zeros(2, 32, dtype=torch.long)
            given[:, :end] = mask[:, :end]
        steps.append(
            logits(model, tokens[:, begin:end], attention_mask=given, position_ids=positions[:, begin:end],
                   past_key_values=cache, use_cache=True)
        )  # fmt: skip
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], full[real], atol=1e-4, rtol=0)


# Gemma 2 and MPNet have no sdpa.
@pytest.mark.parametrize(("name", "implementation"), [
    *((name, "eager") for name in ["llama", "gemma2", "gpt2", *ENCODERS]),
    *((name, "sdpa") for name in ["llama", "gpt2", *ENCODERS] if name != "mpnet"),
])  # fmt: skip
def test_padding_changes_nothing_for_its_neighbours(name: str, implementation: str) -> None:
    model = tiny_model(name, attn_implementation=implementation)
    slimformer.patch(model, filters(model, attention=[1, 2]))
    tokens = ids(1, 12)
    alone = logits(model, tokens)
    side = "left" if name in DECODERS else "right"
    padded = torch.nn.functional.pad(tokens, (4, 0) if side == "left" else (0, 4), value=0)
    mask = (padded != 0).long()
    extra = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if name in DECODERS else {}
    other = ids(2, 16)[1:]
    if extra:
        extra["position_ids"] = torch.cat([extra["position_ids"], torch.arange(16)[None]])
    masks = torch.cat([mask, torch.ones_like(mask)])
    both = logits(model, torch.cat([padded, other]), attention_mask=masks, **extra)
    torch.testing.assert_close(both[0][mask[0].bool()], alone[0], atol=1e-5, rtol=1e-5)


def test_texts_of_a_packed_batch_do_not_read_each_other() -> None:
    model = tiny_model("llama")
    slimformer.patch(model, filters(model, attention=[1]))
    first, second = ids(1, 7), ids(2, 9)[1:]
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None]
    packed = logits(model, torch.cat([first, second], 1), position_ids=positions, use_cache=False)
    torch.testing.assert_close(packed[:, 7:], logits(model, second, use_cache=False), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("replace", ["mean", "filter"])
@pytest.mark.parametrize("kwargs", [
    {"do_sample": False}, {"do_sample": True}, {"num_beams": 3}, {"do_sample": False, "cache_implementation": "static"},
    {"do_sample": False, "prompt_lookup_num_tokens": 3},
], ids=["greedy", "sampling", "beams", "static", "prompt-lookup"])  # fmt: skip
def test_generate_with_and_without_a_cache_agree(kwargs: dict, replace: str) -> None:
    model = tiny_model("llama")
    slimformer.patch(model, filters(model, replace, attention=[0, 2]))
    model.generation_config.disable_compile = True
    rows = 1 if "prompt_lookup_num_tokens" in kwargs else 2
    tokens = ids(rows, 12)
    mask = torch.ones_like(tokens)
    if rows > 1:
        mask[0, :4] = 0
    plain = {k: v for k, v in kwargs.items() if k not in ("cache_implementation", "prompt_lookup_num_tokens")}
    runs = []
    for options in (kwargs, plain | {"use_cache": False}):
        torch.manual_seed(3)
        runs.append(model.generate(tokens, attention_mask=mask, max_new_tokens=12, **options))
    assert torch.equal(*runs)


def test_assisted_generation_crops_the_filter_state() -> None:
    model = tiny_model("llama")
    slimformer.patch(model, filters(model, attention=[0, 2]))
    greedy = model.generate(ids(1, 12), do_sample=False, max_new_tokens=20)
    assisted = model.generate(
        ids(1, 12), do_sample=False, max_new_tokens=20, assistant_model=tiny_model("llama")
    )
    assert torch.equal(assisted, greedy)


def test_the_state_is_small_and_follows_the_beams() -> None:
    model = tiny_model("llama")
    slimformer.patch(model, filters(model, attention=[1]))
    cache = DynamicCache(config=model.config)
    logits(model, ids(2, 30), past_key_values=cache, use_cache=True)
    (state,) = [layer for layer in cache.layers if isinstance(layer, FilterState)]
    assert state.state.shape[2] == 32
    cache.reorder_cache(torch.tensor([1, 0]))
    step = logits(model, ids(2, 31)[:, 30:], past_key_values=cache, use_cache=True)
    whole = torch.cat([ids(2, 30)[[1, 0]], ids(2, 31)[:, 30:]], 1)
    torch.testing.assert_close(step[:, 0], logits(model, whole, use_cache=False)[:, -1], atol=1e-4, rtol=0)


def test_buffers_leave_with_the_patch_and_move_with_the_model() -> None:
    model = tiny_model("llama")
    keys = list(model.state_dict())
    buffers = [name for name, _ in model.named_buffers()]
    before = logits(model, ids())
    slimformer.patch(model, filters(model, attention=[1], mlp=[2]))
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model).to(torch.float64)
    assert logits(twin, ids()).dtype == torch.float64
    slimformer.unpatch(model)
    assert [name for name, _ in model.named_buffers()] == buffers
    assert torch.equal(logits(model, ids()), before)


@pytest.mark.full(1)
@pytest.mark.parametrize("cached", ["whole", "dynamic", "static"])
@pytest.mark.parametrize("replace", ["nothing", "mean", "filter"])
def test_compiles_without_graph_breaks_with_every_cache(replace: str, cached: str) -> None:
    torch.compiler.reset()
    model = tiny_model("llama")
    drop = LayerDrop(attention=[0, 2]) if replace == "nothing" else filters(model, replace, attention=[0, 2])
    slimformer.patch(model, drop)
    tokens = ids(2, 12)
    expected = logits(model, tokens, use_cache=False)[:, -1]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    if cached == "whole":  # the model makes its own cache inside the graph
        last = logits(compiled, tokens)
    else:
        static = cached == "static"
        cache = StaticCache(model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
        logits(model if static else compiled, tokens[:, :10], past_key_values=cache, use_cache=True)
        for index in (10, 11):
            last = logits(compiled, tokens[:, index : index + 1], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(last[:, -1], expected, atol=1e-4, rtol=0)


def test_replacements_without_fitting_are_refused() -> None:
    with pytest.raises(PlanError, match="no fitted weights for attention 3"):
        LayerDrop(attention=[3], replace="mean")
    with pytest.raises(PlanError, match="takes one of nothing, mean, filter"):
        LayerDrop(attention=[3], replace="zero")
    with pytest.raises(PlanError, match="must be"):
        LayerDrop(attention=[0], replace="filter", taps=2,
                  weights={"attention.0.bias": torch.zeros(4), "attention.0.weight": torch.zeros(4, 4)})  # fmt: skip

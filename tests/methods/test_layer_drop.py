"""Dropping sublayers is exact, cached steps equal uncached ones, and unpatching leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

import slimformer
from slimformer import LayerDrop
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.methods.elimination.random_keep import RandomKeep
from tiny_models import DECODERS, ENCODERS, dropped, tiny_model

DROP = LayerDrop(attention=[0], mlp=[1], block=[3])


def logits(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=ids, **kwargs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def ids(rows: int = 2, tokens: int = 12) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


class Zero(nn.Module):
    """Adds nothing to the residual, whatever it is called with."""

    def forward(self, hidden_states: Tensor, *args: object, **kwargs: object) -> Tensor | tuple[Tensor, None]:
        return (
            (torch.zeros_like(hidden_states), None) if self.is_attention else torch.zeros_like(hidden_states)
        )

    def __init__(self, is_attention: bool) -> None:
        super().__init__()
        self.is_attention = is_attention


def without_sublayers(model: nn.Module) -> nn.Module:
    """The model with the dropped sublayers' modules replaced by ones that add nothing (pre-norm structures)."""
    model = copy.deepcopy(model)
    for attribute in ("model", "gpt_neox", "transformer"):
        if hasattr(model, attribute):
            stack = getattr(model, attribute)
    layers = stack.layers if hasattr(stack, "layers") else stack.h
    for index in (0, 3):
        for name in ("self_attn", "attention", "attn"):
            if hasattr(layers[index], name):
                setattr(layers[index], name, Zero(is_attention=True))
    for index in (1, 3):
        layers[index].mlp = Zero(is_attention=False)
    return model


@pytest.mark.parametrize("name", DECODERS)
def test_logits_equal_a_model_built_without_the_sublayers(name: str) -> None:
    model = tiny_model(name)
    expected = logits(without_sublayers(model), ids(), use_cache=False)
    dense = logits(model, ids(), use_cache=False)
    with slimformer.patched(model, DROP):
        actual = logits(model, ids(), use_cache=False)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert (actual - dense).abs().max() > 1e-4


@pytest.mark.parametrize("name", ENCODERS)
def test_encoder_block_drop_equals_skipping_the_layer(name: str) -> None:
    model = tiny_model(name)
    layers = (
        model.layers
        if hasattr(model, "layers")
        else next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    )
    shorter = copy.deepcopy(model)
    inner = (
        shorter.layers
        if hasattr(shorter, "layers")
        else next(m for m in shorter.modules() if isinstance(m, nn.ModuleList))
    )
    mask = torch.ones_like(ids())
    mask[0, 9:] = 0
    if name != "modernbert":  # its layer loop reads a type per index, so a shorter list would shift them
        del inner[2]
        expected = logits(shorter, ids(), attention_mask=mask)
        with slimformer.patched(model, LayerDrop(block=[2])):
            slim = logits(model, ids(), attention_mask=mask)
            torch.testing.assert_close(slim[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    with slimformer.patched(model, LayerDrop(attention=[1], mlp=[2])):
        changed = logits(model, ids(), attention_mask=mask)
    assert torch.isfinite(changed).all()
    assert len(layers) == 4


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
    slimformer.patch(model, LayerDrop(attention=[0], mlp=[1]))
    full = logits(model, tokens, attention_mask=mask, position_ids=positions, use_cache=False)
    cache = StaticCache(model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    steps = []
    for begin, end in [(0, 22), (22, 23), (23, 24), (24, 30)]:
        if static:
            # A static cache is longer than what was seen; the mask names only tokens seen so far.
            given = torch.zeros(2, 32, dtype=torch.long)
            given[:, :end] = mask[:, :end]
        else:
            given = mask[:, :end]
        steps.append(
            logits(model, tokens[:, begin:end], attention_mask=given, position_ids=positions[:, begin:end],
                   past_key_values=cache, use_cache=True)
        )  # fmt: skip
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], full[real], atol=1e-4, rtol=0)


def dict_keys(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    for name, module in model.named_modules():
        yield name, sorted(vars(module))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_unpatch_restores_everything(name: str) -> None:
    model = tiny_model(name)
    before, keys, state = logits(model, ids()), list(dict_keys(model)), list(model.state_dict())
    drop = DROP if name in DECODERS else LayerDrop(block=[0])

    def fail_inside() -> None:
        with slimformer.patched(model, drop):
            assert list(model.state_dict()) == state
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert torch.equal(logits(model, ids()), before)
    assert list(dict_keys(model)) == keys
    assert list(model.state_dict()) == state


def test_patching_twice_equals_patching_once_with_the_second() -> None:
    model = tiny_model("llama")
    second = LayerDrop(attention=[1])
    with slimformer.patched(model, second):
        expected = logits(model, ids())
    slimformer.patch(model, DROP)
    slimformer.patch(model, second)
    assert torch.equal(logits(model, ids()), expected)
    slimformer.unpatch(model)
    assert slimformer.status(model) == {}


def test_a_failed_patch_leaves_the_earlier_one() -> None:
    model = slimformer.patch(tiny_model("llama"), LayerDrop(attention=[1]))
    with pytest.raises(PlanError, match="allowed are 0 to 3"):
        slimformer.patch(model, LayerDrop(mlp=[9]))
    assert dropped(model) == {1: ["attention"]}


@pytest.mark.parametrize(("arguments", "message"), [
    ({"attention": [-1]}, "got -1"), ({"mlp": [1, 1]}, "twice"), ({"block": ["a"]}, "got 'a'"),
])  # fmt: skip
def test_wrong_indices_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        LayerDrop(**arguments)


def test_dropping_every_attention_that_counts_positions_is_refused() -> None:
    model = tiny_model("gemma2")  # sliding attentions are layers 0 and 2, and slot 0 is a sliding one
    with pytest.raises(PlanError, match="Keep at least one attention"):
        slimformer.patch(model, LayerDrop(attention=[0, 2]))
    assert slimformer.status(model) == {}


def test_a_layer_that_computes_something_else_than_its_parts_suggest_runs_as_it_is() -> None:
    model = tiny_model("llama")
    layer = type(model.model.layers[0])

    class Scaled(layer):
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            return super().forward(*args, **kwargs) * 1.5

    for child in model.model.layers:
        child.__class__ = Scaled
    found = slimformer.support(model)
    assert found.tier == "sublayers"
    assert "computes something else" in found.reason
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        slimformer.patch(model, RandomKeep(0.5))
    assert slimformer.status(model) == {}
    slimformer.patch(model, LayerDrop(attention=[1]))
    assert dropped(model) == {1: ["attention"]}


def test_hidden_states_keep_their_number_and_copies_stay_apart() -> None:
    model = slimformer.patch(tiny_model("llama"), DROP)
    with torch.no_grad():
        assert len(model(input_ids=ids(), output_hidden_states=True).hidden_states) == 5
    twin = copy.deepcopy(model)
    expected = logits(model, ids())
    slimformer.unpatch(model)
    assert torch.equal(logits(twin, ids()), expected)
    slimformer.unpatch(twin)
    assert torch.equal(logits(twin, ids()), logits(model, ids()))


@pytest.mark.parametrize("kwargs", [
    {"do_sample": False}, {"do_sample": True}, {"num_beams": 3}, {"do_sample": False, "cache_implementation": "static"},
], ids=["greedy", "sampling", "beams", "static"])  # fmt: skip
def test_generate_with_and_without_a_cache_agree(kwargs: dict) -> None:
    model = slimformer.patch(tiny_model("llama"), DROP)
    model.generation_config.disable_compile = True
    mask = torch.ones_like(ids())
    mask[0, :4] = 0
    runs = []
    for options in (
        kwargs,
        {k: v for k, v in kwargs.items() if k != "cache_implementation"} | {"use_cache": False},
    ):
        torch.manual_seed(3)
        runs.append(model.generate(ids(), attention_mask=mask, max_new_tokens=8, **options))
    assert torch.equal(*runs)


def test_compiles_without_graph_breaks() -> None:
    model = slimformer.patch(tiny_model("llama"), DROP)
    expected = logits(model, ids(), use_cache=False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits(compiled, ids(), use_cache=False), expected)

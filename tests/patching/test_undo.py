"""A patch is undone exactly, whatever was put on the model around it: other patches, forwards, wrappers, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel

import slimformer
from slimformer import LayerDrop, Plan, TempScale
from slimformer.errors import PlanError
from slimformer.methods.temperature import LogNScale
from slimformer.patching import patched, switched_off
from tiny_models import tiny_model

IDS = torch.randint(3, 64, (2, 20), generator=torch.Generator().manual_seed(2))
OUTER, INNER = LayerDrop(attention=[1]), LayerDrop(mlp=[2])


def sharp(name: str = "llama", **overrides: object) -> PreTrainedModel:
    """A tiny model with weights so large that every change shows."""
    model = tiny_model(name, **overrides)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def outputs(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS)[0]
    return found


def attributes(model: nn.Module) -> dict[str, set[str]]:
    return {name: set(vars(module)) for name, module in model.named_modules()}


def halved(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return forward(*args, **kwargs) * 0.5

    return wrapper


def with_half_a_layer(*methods: Any) -> Tensor:
    """What a model gives whose layer 1 hands on half of its output."""
    model = slimformer.patch(sharp(), *methods) if methods else sharp()
    model.model.layers[1].register_forward_hook(lambda module, args, output: output * 0.5)
    return outputs(model)


@pytest.mark.parametrize("outer", [OUTER, TempScale(0.5), LogNScale(4)], ids=lambda m: type(m).__name__)
def test_the_outer_patch_comes_back_behind_an_inner_block(outer: Any) -> None:
    model, alone = slimformer.patch(sharp(), outer), outputs(slimformer.patch(sharp(), INNER))
    before, status = outputs(model), slimformer.status(model)
    with patched(model, INNER):
        assert torch.equal(outputs(model), alone)
        with patched(model, TempScale(0.7)):
            assert not torch.equal(outputs(model), alone)
        assert torch.equal(outputs(model), alone)
    assert torch.equal(outputs(model), before)
    assert slimformer.status(model) == status
    untouched = sharp()
    slimformer.unpatch(model)
    assert torch.equal(outputs(model), outputs(untouched))
    assert attributes(model) == attributes(untouched)


def test_the_outer_patch_comes_back_after_errors_and_patches_inside_the_block() -> None:
    model = slimformer.patch(sharp(), OUTER)
    before = outputs(model)
    with pytest.raises(IndexError), patched(model, INNER):
        model(torch.full((1, 2), 9999))
    with pytest.raises(PlanError), patched(model, LayerDrop(mlp=[99])):
        pass
    assert torch.equal(outputs(model), before)
    with patched(model, INNER):
        slimformer.patch(model, TempScale(0.7))
    assert torch.equal(outputs(model), before)
    with patched(model, INNER):
        slimformer.unpatch(model)
        assert torch.equal(outputs(model), outputs(sharp()))
    assert torch.equal(outputs(model), before)


def test_blocks_that_end_in_another_order_leave_the_model_as_it_was() -> None:
    model, untouched = sharp(), sharp()
    first, second = patched(model, OUTER), patched(model, INNER)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(outputs(model), outputs(slimformer.patch(sharp(), INNER)))
    second.__exit__(None, None, None)
    assert torch.equal(outputs(model), outputs(untouched))
    assert attributes(model) == attributes(untouched)


def test_a_part_of_a_model_and_the_whole_have_one_patch() -> None:
    model, dense = sharp(), outputs(sharp())
    slimformer.patch(model.model, OUTER)
    assert slimformer.status(model) == slimformer.status(model.model) != {}
    slimformer.patch(model, INNER)
    assert torch.equal(outputs(model), outputs(slimformer.patch(sharp(), INNER)))
    slimformer.unpatch(model.model)
    assert torch.equal(outputs(model), dense)
    assert attributes(model) == attributes(sharp())


def test_a_forward_that_was_there_before_is_called() -> None:
    model, expected = sharp(), with_half_a_layer(LayerDrop(attention=[3]))
    layer = model.model.layers[1]
    layer.forward = own = halved(layer.forward)
    slimformer.patch(model, LayerDrop(attention=[3]))
    assert torch.equal(outputs(model), expected)
    assert slimformer.status(model)[1] == {"attention": "all rows", "mlp": "all rows"}
    assert vars(slimformer.unpatch(model).model.layers[1])["forward"] is own


@pytest.mark.parametrize("hooked", [False, True])
def test_nothing_is_left_out_of_a_layer_with_a_forward_of_its_own(hooked: bool) -> None:
    model = sharp()
    layer = model.model.layers[1]
    layer.forward = halved(layer.forward)
    if hooked:
        add_hook_to_module(layer, ModelHook())
    before = outputs(model)
    with pytest.raises(PlanError, match="was replaced by somebody"):
        slimformer.patch(model, OUTER)
    assert torch.equal(outputs(model), before)
    assert slimformer.status(model) == {}


def test_a_wrapper_put_on_later_runs_and_survives() -> None:
    model, expected = slimformer.patch(sharp(), OUTER), with_half_a_layer(OUTER)
    layer = model.model.layers[1]
    layer.forward = wrapper = halved(layer.forward)
    assert torch.equal(outputs(model), expected)
    with switched_off(model):
        assert torch.equal(outputs(model), with_half_a_layer())
    assert torch.equal(outputs(model), expected)
    slimformer.unpatch(model)
    assert layer.forward is wrapper
    assert slimformer.status(model) == {}
    assert torch.equal(outputs(model), with_half_a_layer())


def test_a_wrapper_put_on_inside_a_block_stays_around_the_outer_patch() -> None:
    model = slimformer.patch(sharp(), OUTER)
    layer = model.model.layers[1]
    with patched(model, INNER):
        layer.forward = halved(layer.forward)
    assert torch.equal(outputs(model), with_half_a_layer(OUTER))
    assert torch.equal(outputs(slimformer.unpatch(model)), with_half_a_layer())


def test_a_method_that_was_wrapped_later_stays_wrapped(tmp_path: Any) -> None:
    model = slimformer.patch(sharp(), Plan([OUTER]))
    saved: list[str] = []
    had = model.save_pretrained

    def save(folder: str) -> None:
        saved.append(folder)
        had(folder)

    model.save_pretrained = save
    slimformer.unpatch(model).save_pretrained(str(tmp_path))
    assert saved == [str(tmp_path)]
    assert not (tmp_path / "slimformer.json").exists()


@pytest.mark.parametrize("method", [OUTER, LogNScale(4)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("order", ["hooks first", "patch first"])
def test_hooks_that_come_and_go_leave_nothing_of_the_patch(order: str, method: Any) -> None:
    model = sharp()
    modules = [*model.model.layers, model.model]

    def hook() -> None:
        for module in modules:
            add_hook_to_module(module, ModelHook())

    if order == "hooks first":
        hook()
    slimformer.patch(model, method)
    changed = outputs(slimformer.patch(sharp(), method))
    if order == "patch first":
        hook()
    assert torch.equal(outputs(model), changed)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(outputs(model), changed)
    slimformer.unpatch(model)
    assert slimformer.status(model) == {}
    assert torch.equal(outputs(model), outputs(sharp()))


def test_hooks_put_on_a_patched_model_stay_when_it_is_unpatched() -> None:
    model = slimformer.patch(sharp(), OUTER)
    calls: list[nn.Module] = []

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    layer = model.model.layers[1]
    add_hook_to_module(layer, Counting())
    slimformer.unpatch(model)
    assert torch.equal(outputs(model), outputs(sharp()))
    assert calls == [layer]


@pytest.mark.parametrize("method", [None, OUTER, TempScale(0.7)], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("name", ["bert", "mpnet", "llama"])
def test_every_module_keeps_its_training_flag(name: str, method: Any) -> None:
    model = sharp(name)
    for number, module in enumerate(model.modules()):
        module.training = number % 3 == 0
    before = {part: module.training for part, module in model.named_modules()}
    slimformer.patch(model, *(() if method is None else (method,)))
    assert {part: module.training for part, module in model.named_modules()} == before
    slimformer.unpatch(model)
    assert {part: module.training for part, module in model.named_modules()} == before

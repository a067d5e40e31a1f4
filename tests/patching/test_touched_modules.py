"""What somebody has put on a module of a layer runs as it did: with all tokens, in the shapes that it expects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.methods.test_mixture_of_depths import routed
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

import slimformer
from slimformer import LayerDrop, TokenElimination
from slimformer.errors import PlanError
from slimformer.methods.elimination.random_keep import RandomKeep
from slimformer.model.anatomy import find_anatomy
from slow_rows import arguments, batch, error, kept, one_thread, outputs, positions, slowly, small  # noqa: F401

CLOSE = 1e-5
NAMES = ["llama", "gemma2", "gpt2", "gpt_neox", "bert", "distilbert", "modernbert"]
Shapes = list[tuple[int, ...]]


def first_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def written_at(output: Any) -> Any:
    """An output with the tokens at one place changed, as steering does it."""
    found = first_of(output).clone()
    found[:, 9] *= 0.3
    return (found, *output[1:]) if isinstance(output, tuple) else found


def hooked(module: nn.Module, shapes: Shapes) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        shapes.append(tuple(first_of(output).shape))
        return written_at(output)

    return module.register_forward_hook(hook).remove


def pre_hooked(module: nn.Module, shapes: Shapes) -> Callable[[], None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        shapes.append(tuple(x.shape))
        return (
            ((written_at(x), *args[1:]), kwargs)
            if args
            else (args, {**kwargs, "hidden_states": written_at(x)})
        )

    return module.register_forward_pre_hook(hook, with_kwargs=True).remove


def wrapped(module: nn.Module, shapes: Shapes) -> Callable[[], None]:
    had = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = had(*args, **kwargs)
        shapes.append(tuple(first_of(output).shape))
        return written_at(output)

    module.forward = forward
    return lambda: vars(module).pop("forward")


TOUCHES = {"hook": hooked, "pre-hook": pre_hooked, "forward": wrapped}


@contextmanager
def touching(touch: str, module: nn.Module) -> Iterator[Shapes]:
    shapes: Shapes = []
    undo = TOUCHES[touch](module, shapes)
    try:
        yield shapes
    finally:
        undo()


def called(model: nn.Module, given: dict[str, Tensor]) -> dict[str, nn.Module]:
    """The modules within one layer that a forward pass calls with all tokens."""
    layer = find_anatomy(model).layers[1]
    found: dict[str, nn.Module] = {}
    for name, module in layer.named_modules():
        if name:
            with touching("hook", module) as shapes:
                outputs(model, given)
            if shapes and len(shapes[0]) == 3 and shapes[0][:2] == (3, 24):
                found[name] = module
    return found


@pytest.mark.parametrize("touch", TOUCHES)
@pytest.mark.parametrize("name", NAMES)
def test_whoever_touches_a_module_sees_what_the_unpatched_model_shows(name: str, touch: str) -> None:
    model, given = small(name), batch(name, "left")
    real, modules = given["attention_mask"], called(model, batch(name, "left"))
    assert len(modules) > 5
    assert ("attention" in modules) == (name in ("gpt_neox", "bert", "distilbert"))
    for path, module in modules.items():
        with touching(touch, module) as expected_shapes:
            expected = outputs(model, given)
        slimformer.patch(model)
        with touching(touch, module) as shapes:
            assert error(outputs(model, given), expected, real) <= CLOSE, path
        assert shapes == expected_shapes, path
        slimformer.unpatch(model)
        with touching(touch, module) as shapes:
            slimformer.patch(model)
            assert error(outputs(model, given), expected, real) <= CLOSE, path
            slimformer.unpatch(model)
        assert shapes == expected_shapes or touch == "forward", path


@pytest.mark.parametrize("touch", ["hook", "forward"])
@pytest.mark.parametrize("name", NAMES)
def test_whoever_touches_a_module_where_tokens_are_chosen_sees_all(name: str, touch: str) -> None:
    model, given, method = small(name), batch(name, "left"), RandomKeep(0.5, seed=3)
    real, modules = given["attention_mask"], called(model, batch(name, "left"))
    masks = kept(method, positions(real))
    for path, module in modules.items():
        with slowly(model, masks), touching(touch, module) as expected_shapes:
            expected = outputs(model, given)
        if not expected_shapes:
            # The slow way leaves dropout out.
            continue
        slimformer.patch(model, method)
        with touching(touch, module) as shapes:
            assert error(outputs(model, given), expected, real) <= CLOSE, path
        assert shapes == expected_shapes, path
        slimformer.unpatch(model)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_layer_whose_forward_was_replaced_before_the_patch_runs_it(name: str) -> None:
    model, given = small(name), batch(name, "left")
    layer = find_anatomy(model).layers[1]
    with touching("forward", layer) as shapes:
        expected = outputs(model, given)
        slimformer.patch(model)
        assert error(outputs(model, given), expected, given["attention_mask"]) <= CLOSE
        assert shapes == [(3, 24, 32)] * 2
        assert slimformer.status(model)[1] == {"attention": "all rows", "mlp": "all rows"}
        slimformer.unpatch(model)
        for method in (LayerDrop(mlp=[1]), RandomKeep(0.5)):
            with pytest.raises(PlanError, match="was replaced by somebody else's"):
                slimformer.patch(model, method)
        slimformer.patch(model, LayerDrop(mlp=[2]))
        outputs(model, given)
        assert len(shapes) == 3
        slimformer.unpatch(model)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_layer_that_is_wrapped_after_the_patch_sees_the_whole_batch(name: str) -> None:
    model, given = small(name), batch(name, "left")
    layer = find_anatomy(model).layers[1]
    with touching("forward", layer):
        expected = outputs(model, given)
    slimformer.patch(model)
    ours = layer.forward
    shapes: Shapes = []
    wrapped(layer, shapes)
    assert error(outputs(model, given), expected, given["attention_mask"]) <= CLOSE
    assert shapes == [(3, 24, 32)]
    layer.forward = ours
    outputs(model, given)
    assert shapes == [(3, 24, 32)]


def test_backward_hooks_see_gradients_of_the_whole_batch() -> None:
    model, given = small("llama"), batch("llama", "left")
    layer = find_anatomy(model).layers[1]
    for module in (layer.mlp, layer.mlp.down_proj, layer.self_attn.q_proj):
        shapes: Shapes = []
        hook = module.register_full_backward_hook(lambda m, i, out, s=shapes: s.append(tuple(out[0].shape)))
        with slimformer.patched(model, RandomKeep(0.5, seed=3)):
            model(**given).logits.square().mean().backward()
        hook.remove()
        assert [shape[:2] for shape in shapes] == [(3, 24)]


def test_what_is_put_in_place_of_a_module_runs() -> None:
    class Doubled(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            assert hidden_states.dim() == 3
            return 2 * super().forward(hidden_states)

    model, given, method = small("llama"), batch("llama", "left"), RandomKeep(0.5, seed=3)
    layer = find_anatomy(model).layers[1]
    slimformer.patch(model, method)
    had, layer.post_attention_layernorm = layer.post_attention_layernorm, Doubled(32, eps=1e-6)
    layer.post_attention_layernorm.weight = had.weight
    actual = outputs(model, given)
    slimformer.unpatch(model)
    with slowly(model, kept(method, positions(given["attention_mask"]))):
        expected = outputs(model, given)
    assert error(actual, expected, given["attention_mask"]) <= CLOSE


def test_steps_of_a_routed_model_show_hooks_one_token_of_every_text() -> None:
    model = small("llama")
    given = {"input_ids": arguments("llama", [(0, 24)] * 18)["input_ids"]}
    slimformer.patch(model, routed(attention=[1], mlp=[1]))
    layer = find_anatomy(model).layers[1]
    model.generation_config.disable_compile = True
    expected = model.generate(**given, do_sample=False, min_new_tokens=4, max_new_tokens=4)
    for module in (layer.mlp, layer.self_attn, layer.input_layernorm, layer.post_attention_layernorm):
        shapes: Shapes = []
        hook = module.register_forward_hook(lambda m, a, out, s=shapes: s.append(tuple(first_of(out).shape)))
        actual = model.generate(**given, do_sample=False, min_new_tokens=4, max_new_tokens=4)
        hook.remove()
        assert torch.equal(actual, expected)
        assert set(shapes) == {(18, 24, 32), (18, 1, 32)}


def test_a_touched_mlp_behind_eliminated_tokens_sees_the_batch_and_a_touched_attention_is_refused() -> None:
    model, given = small("llama"), batch("llama", "none")
    method = TokenElimination({2: 0.4}, scorer="random", least=8, window=3, sink=2)
    layer = find_anatomy(model).layers[3]
    slimformer.patch(model, method)
    expected = outputs(model, given)
    shapes: Shapes = []
    hook = layer.mlp.register_forward_hook(lambda m, a, out: shapes.append(tuple(out.shape)))
    assert error(outputs(model, given), expected) <= CLOSE
    assert shapes == [(3, 24, 32)]
    hook.remove()
    layer.self_attn.register_forward_hook(lambda m, a, out: None)
    with pytest.raises(PlanError, match="hooks or a forward of its own"):
        outputs(model, given)

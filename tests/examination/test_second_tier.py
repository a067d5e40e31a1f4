"""Models whose layers no row of the structure table describes: sublayers and layers are dropped by their modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    FlavaTextConfig,
    FlavaTextModel,
    PreTrainedModel,
)

import slimformer
from slimformer import EarlyExit, LayerDrop, TempScale, TokenElimination
from slimformer.calls.layer_calls import cache_argument
from slimformer.errors import UnsupportedModelError
from slimformer.methods.elimination.random_keep import RandomKeep
from slimformer.model.anatomy import find_anatomy
from slow_rows import arguments, error, outputs, small
from tiny_models import COMMON

TEXTS = [(5, 19), (0, 24), (21, 3)]
# A layer that adds its residual inside its modules; an MLP that takes the residual; recurrent layers beside attention.
OWN: dict[str, dict[str, Any]] = {
    "bloom": {"n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4},
    "recurrent_gemma": {
        "head_dim": 8,
        "lru_width": 32,
        "attention_window_size": 32,
        "block_types": ["attention", "recurrent", "recurrent"],
    },
}
# The modules of the sublayers of layer 2.
MODULES = {
    "bloom": (
        {"self_attention.query_key_value", "self_attention.dense"},
        {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
    ),
    "mpt": ({"attn"}, {"ffn.up_proj", "ffn.down_proj"}),
    "recurrent_gemma": ({"temporal_block"}, {"mlp_block"}),
}


def opaque(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**COMMON, **OWN[name]})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if weight.dim() > 1 and "embed" not in path:
                weight.mul_(4.0)
            elif weight.dim() == 1:
                weight.add_(torch.randn_like(weight) * 0.2)
    return model


def cached(model: nn.Module, given: dict[str, Tensor], first: int = 21) -> Tensor:
    """Logits read in a prefill and steps of one token, through the cache that the model makes itself."""
    tokens, cache, found = given["input_ids"].shape[1], DynamicCache(config=model.config), []
    for begin, end in [(0, first), *((i, i + 1) for i in range(first, tokens))]:
        part = {
            "input_ids": given["input_ids"][:, begin:end],
            "attention_mask": given["attention_mask"][:, :end],
        }
        found.append(outputs(model, part, use_cache=True, **{cache_argument(model): cache}))
    return torch.cat(found, 1)


def zeroed(model: PreTrainedModel, paths: set[str], layer: int) -> list[Any]:
    """Let modules put out zeros after having computed everything; returns the hooks."""

    def zero(module: nn.Module, args: Any, output: Any) -> Any:
        return (output[0] * 0, *output[1:]) if isinstance(output, tuple) else output * 0

    of = find_anatomy(model).layers[layer]
    return [of.get_submodule(path).register_forward_hook(zero) for path in paths]


@pytest.mark.parametrize("name", OWN)
def test_the_tier_and_why_are_said_and_the_plain_patch_changes_nothing(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, given = opaque(name), arguments("bert", TEXTS)
    dense = outputs(model, given)
    found = slimformer.support(model)
    assert found.tier == "sublayers"
    assert type(find_anatomy(model).layers[0]).__name__ in found.reason
    assert "tier 'sublayers'" in found.describe()
    assert str(found) == found.describe()
    assert "Linear(" not in repr(found)
    slimformer.patch(model)
    assert "runs as it did" in caplog.text
    assert slimformer.status(model)[2] == {"attention": "all rows", "mlp": "all rows"}
    assert torch.equal(outputs(model, given), dense)


@pytest.mark.parametrize("which", [0, 1], ids=["attention", "mlp"])
@pytest.mark.parametrize("name", OWN)
def test_a_dropped_sublayer_is_one_whose_modules_put_out_zeros(name: str, which: int) -> None:
    model, given = opaque(name), arguments("bert", TEXTS)
    kind, paths, mask = ("attention", "mlp")[which], MODULES[name][which], given["attention_mask"]
    dense = outputs(model, given)
    hooks = zeroed(model, paths, 2)
    expected = outputs(model, given)
    for hook in hooks:
        hook.remove()
    keys = [set(vars(m)) for m in model.modules()]
    computed: list[str] = []
    layer = find_anatomy(model).layers[2]
    for path, module in layer.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in paths)
        if inside and isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, path=path: computed.append(path))
    with slimformer.patched(model, LayerDrop(**{kind: [2]})):
        assert slimformer.status(model)[2][kind] == "dropped"
        assert error(outputs(model, given), expected, mask) <= 1e-5
        assert error(cached(model, given), expected, mask) <= 1e-5
    assert computed == []
    assert error(expected, dense, mask) > 0.05
    assert torch.equal(outputs(model, given), dense)
    assert [set(vars(m)) for m in model.modules()] == keys


@pytest.mark.parametrize("name", OWN)
def test_dropped_layers_hand_their_input_on(name: str) -> None:
    model, given = opaque(name), arguments("bert", TEXTS)
    mask = given["attention_mask"]
    hidden = outputs_before_the_head(model, given, LayerDrop())
    with slimformer.patched(model, EarlyExit(3)):
        exit_logits = outputs(model, given)
        assert error(cached(model, given), exit_logits, mask) <= 1e-5
        assert outputs_before_the_head(model, given, None) == hidden[:3]
    with slimformer.patched(model, LayerDrop(block=[3])):
        assert torch.equal(outputs(model, given), exit_logits)


def outputs_before_the_head(model: PreTrainedModel, given: dict[str, Tensor], method: Any) -> list[float]:
    """What the layers that run get, one number each."""
    found: list[float] = []
    layers = list(find_anatomy(model).layers)[:3]
    hooks = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: found.append(
                float((args or (kwargs.get("hidden_states"),))[0].abs().sum())
            ),
            with_kwargs=True,
        )
        for layer in layers
    ]
    outputs(model, given)
    for hook in hooks:
        hook.remove()
    return found


def test_a_mean_stands_for_a_dropped_sublayer() -> None:
    model, given = opaque("mpt"), arguments("bert", TEXTS)
    mean = torch.linspace(-1.0, 1.0, 32)
    method = LayerDrop(mlp=[2], replace="mean", weights={"mlp.2.bias": mean})
    layer = find_anatomy(model).layers[2]
    hook = layer.ffn.down_proj.register_forward_hook(lambda module, args, output: output * 0 + mean)
    expected = outputs(model, given)
    hook.remove()
    with slimformer.patched(model, method):
        assert error(outputs(model, given), expected, given["attention_mask"]) <= 1e-6


@pytest.mark.parametrize(
    "method",
    [
        lambda: RandomKeep(0.5),
        lambda: TokenElimination({2: 0.5}),
        lambda: slimformer.MixtureOfDepths.keeping_everything(32, mlp=[1]),
    ],
    ids=["rows", "elimination", "depths"],
)
def test_methods_that_choose_tokens_are_refused_by_name(method: Callable[[], Any]) -> None:
    model = opaque("mpt")
    with pytest.raises(UnsupportedModelError, match=r"Tokens cannot be left out.*MptBlock.*LayerDrop"):
        slimformer.patch(model, method())
    assert slimformer.status(model) == {}


def test_modules_that_layers_share_are_not_switched_off() -> None:
    model = opaque("mpt")
    layers = find_anatomy(model).layers
    layers[3].ffn.down_proj = layers[2].ffn.down_proj
    with pytest.raises(UnsupportedModelError, match="other layers share"):
        slimformer.patch(model, LayerDrop(mlp=[2]))
    slimformer.patch(model, LayerDrop(mlp=[1]))


def test_a_temperature_applies_where_scores_have_a_scale() -> None:
    model, given = small("llama"), arguments("bert", TEXTS)
    with slimformer.patched(model, TempScale(0.5)):
        expected = outputs(model, given)
    for layer in model.model.layers:
        layer.extra = nn.Identity()
    assert slimformer.support(model).tier == "sublayers"
    with slimformer.patched(model, TempScale(0.5)):
        assert error(outputs(model, given), expected, given["attention_mask"]) <= 1e-6


def test_an_encoder_without_a_row_in_the_table_loses_layers() -> None:
    torch.manual_seed(0)
    model, given = FlavaTextModel(FlavaTextConfig(**COMMON)).eval(), arguments("bert", TEXTS)
    assert slimformer.support(model).tier == "sublayers"
    dense = outputs(model, given)
    with slimformer.patched(model, LayerDrop(mlp=[1], block=[2])):
        assert error(outputs(model, given), dense, given["attention_mask"]) > 1e-3
    assert torch.equal(outputs(model, given), dense)

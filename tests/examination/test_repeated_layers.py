"""Stacks that call one layer at several depths: what is left out is left out at the depth that was named, and there."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AlbertConfig, AlbertForMaskedLM, AlbertModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.albert.modeling_albert import AlbertTransformer

import slimformer
from slimformer import EarlyExit, LayerDrop, Plan, TempScale, TokenElimination
from slimformer.errors import CalibrationError, PlanError, SlimformerError, UnsupportedModelError
from slimformer.model.layer_parts import Kind
from slimformer.plans.plan import fingerprint
from slimformer.training.repair import repair
from slow_rows import arguments, error

# Padding on either side, and none.
GIVEN = arguments("bert", [(5, 19), (0, 24), (0, 17)])
TEXT = GIVEN["attention_mask"].bool()
SIZES = {"one layer": {}, "two groups": {"num_hidden_groups": 2}, "layers in a group": {"inner_group_num": 2},
         "layers in groups": {"num_hidden_groups": 2, "inner_group_num": 2}}  # fmt: skip


def albert(**own: Any) -> AlbertModel:
    torch.manual_seed(0)
    config = AlbertConfig(vocab_size=64, embedding_size=16, hidden_size=32, intermediate_size=48, pad_token_id=0,
                          num_attention_heads=4, max_position_embeddings=64,
                          **{"num_hidden_layers": 4, **own})  # fmt: skip
    model = AlbertModel(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10.0) if weight.dim() > 1 else weight.add_(torch.randn_like(weight) * 0.2)
    return model


def order(model: AlbertModel) -> list[nn.Module]:
    """The layers in the order of their calls, by ALBERT's rule."""
    groups, depth = model.encoder.albert_layer_groups, model.config.num_hidden_layers
    return [layer for i in range(depth) for layer in groups[i * len(groups) // depth].albert_layers]


def by_hand(
    model: AlbertModel,
    attention: Collection[int] = (),
    mlp: Collection[int] = (),
    block: Collection[int] = (),
    factor: float = 1.0,
) -> Tensor:
    """The last hidden states, written out, without some sublayers and layers."""
    x = model.encoder.embedding_hidden_mapping_in(model.embeddings(GIVEN["input_ids"]))
    hidden = torch.zeros(TEXT.shape, dtype=x.dtype).masked_fill(~TEXT, torch.finfo(x.dtype).min)[
        :, None, None
    ]
    for depth, layer in enumerate(order(model)):
        if depth in block:
            continue
        attended = torch.zeros_like(x)
        if depth not in attention:
            own = layer.attention
            q, k, v = (
                linear(x).unflatten(-1, (4, 8)).transpose(1, 2) for linear in (own.query, own.key, own.value)
            )
            probabilities = (q @ k.transpose(2, 3) * (factor * 8**-0.5) + hidden).softmax(-1)
            attended = own.dense((probabilities @ v).transpose(1, 2).flatten(2))
        x = layer.attention.LayerNorm(x + attended)
        added = torch.zeros_like(x) if depth in mlp else layer.ffn_output(layer.activation(layer.ffn(x)))
        x = layer.full_layer_layer_norm(added + x)
    return x


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**GIVEN).last_hidden_state
    return found


def right(model: nn.Module, expected: Tensor, limit: float = 1e-5) -> bool:
    return error(run(model), expected.detach(), GIVEN["attention_mask"]) <= limit


@pytest.mark.parametrize("sizes", SIZES)
def test_the_tier_and_why_are_said_and_the_plain_patch_changes_nothing(sizes: str) -> None:
    model = albert(**SIZES[sizes])
    whole, count = run(model), len(order(model))
    found = slimformer.support(model)
    assert found.tier == "sublayers"
    assert f"calls AlbertLayer {count} times" in found.describe()
    assert [id(layer) for layer in found.anatomy.layers] == [id(layer) for layer in order(model)]
    assert right(model, by_hand(model))
    slimformer.patch(model)
    assert torch.equal(run(model), whole)
    assert list(slimformer.status(model)) == list(range(count))


@pytest.mark.parametrize("sizes", SIZES)
def test_sublayers_and_layers_are_left_out_at_the_depth_that_is_named(sizes: str) -> None:
    model = albert(**SIZES[sizes])
    state, whole = [set(vars(m)) for m in model.modules()], run(model)
    for drop in (
        {"attention": [1]}, {"mlp": [2]}, {"block": [0]}, {"block": [3]},
        {"attention": [0, 2], "mlp": [1], "block": [3]}, {"attention": [1], "mlp": [1, 3]},
    ):  # fmt: skip
        gone = {
            **drop,
            "block": [*drop.get("block", []), *set(drop.get("attention", [])) & set(drop.get("mlp", []))],
        }
        expected = by_hand(model, **gone)
        assert error(expected.detach(), whole, GIVEN["attention_mask"]) > 0.02
        with slimformer.patched(model, LayerDrop(**drop)):
            assert right(model, expected)
            kinds: dict[str, list[Kind]] = {
                "attention": ["attention"],
                "mlp": ["mlp"],
                "block": ["attention", "mlp"],
            }
            said = {(i, kind) for name, layers in drop.items() for i in layers for kind in kinds[name]}
            status = slimformer.status(model)
            assert {(i, kind) for i in status for kind in status[i] if status[i][kind] == "dropped"} == said
        assert torch.equal(run(model), whole)
        assert [set(vars(m)) for m in model.modules()] == state


@pytest.mark.parametrize("sizes", SIZES)
def test_no_layer_from_the_exit_on_computes_anything(sizes: str) -> None:
    model = albert(**SIZES[sizes])
    count = len(order(model))
    # Recording hidden states leaves hooks of transformers' own behind.
    dense = model(**GIVEN, output_hidden_states=True).hidden_states
    computed: list[int] = []
    for number, layer in enumerate(dict.fromkeys(order(model))):
        layer.ffn.register_forward_hook(lambda *_, number=number: computed.append(number))
    expected = by_hand(model, block=range(3, count))
    computed.clear()
    slimformer.patch(model, EarlyExit(3))
    assert right(model, expected)
    assert len(computed) == 3
    found = model(**GIVEN, output_hidden_states=True).hidden_states
    assert len(found) == len(dense) == count + 1
    assert all(torch.equal(a, b) for a, b in zip(found[:4], dense[:4], strict=True))
    assert all(torch.equal(state, found[3]) for state in found[3:])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_scores_are_scaled_once_for_every_depth(sizes: str, attention: str) -> None:
    model = albert(**SIZES[sizes], attn_implementation=attention)
    whole, once, twice = run(model), by_hand(model, factor=2.0), by_hand(model, factor=4.0, mlp=[1])
    slimformer.patch(model, TempScale(0.5))
    assert right(model, once)
    assert not right(model, whole, 1e-2)
    assert {of["attention"] for of in slimformer.status(model).values()} == {"all rows, TempScale(tau=0.5)"}
    slimformer.patch(model, TempScale(0.5), TempScale(0.5), LayerDrop(mlp=[1]))
    assert right(model, twice)
    assert torch.equal(run(slimformer.unpatch(model)), whole)


@pytest.mark.parametrize("drop", [{"attention": [1]}, {"mlp": [2]}, {"block": [3]}], ids=str)
def test_half_precision_leaves_out_the_same(drop: dict[str, list[int]]) -> None:
    model = albert()
    expected = by_hand(model, **drop)
    model.to(torch.bfloat16)
    own = error(by_hand(model, **drop).detach().float(), expected.detach(), GIVEN["attention_mask"])
    slimformer.patch(model, LayerDrop(**drop))
    assert error(run(model).float(), expected.detach(), GIVEN["attention_mask"]) <= 2 * own < 0.1


def test_a_second_patch_takes_the_place_of_the_first() -> None:
    model = albert()
    whole, first, second = run(model), by_hand(model, attention=[1]), by_hand(model, mlp=[1], block=[3])
    slimformer.patch(model, LayerDrop(attention=[1]))
    with slimformer.patched(model, LayerDrop(mlp=[1], block=[3])):
        assert right(model, second)
    assert right(model, first)
    slimformer.patch(model, LayerDrop(mlp=[1], block=[3]))
    assert right(model, second)
    assert torch.equal(run(slimformer.unpatch(model)), whole)


def test_a_copy_of_a_patched_model_leaves_out_the_same_and_is_its_own() -> None:
    model = albert(num_hidden_groups=2)
    whole, expected = run(model), by_hand(model, attention=[0], block=[2])
    copied = copy.deepcopy(slimformer.patch(model, LayerDrop(attention=[0], block=[2])))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    slimformer.unpatch(model)
    assert right(copied, expected)
    assert torch.equal(run(slimformer.unpatch(copied)), whole)


def test_the_depth_is_that_of_the_call_that_runs_in_this_thread() -> None:
    model = albert()
    expected = by_hand(model, attention=[1], block=[2])
    slimformer.patch(model, LayerDrop(attention=[1], block=[2]))
    # Both calls are at every depth at once.
    together, found = threading.Barrier(2, timeout=30), list[Tensor]()

    def waits(module: nn.Module, args: Any) -> None:
        together.wait()

    order(model)[0].register_forward_pre_hook(waits)
    threads = [threading.Thread(target=lambda: found.append(run(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error(of, expected.detach(), GIVEN["attention_mask"]) <= 1e-5 for of in found] == [True, True]


def test_a_call_that_ends_in_an_exception_leaves_no_count_behind() -> None:
    model = albert()
    expected = by_hand(model, attention=[1], block=[3])
    slimformer.patch(model, LayerDrop(attention=[1], block=[3]))
    calls: list[int] = []

    def fails_at_the_third(module: nn.Module, args: Any) -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            raise KeyError("the third")

    hook = order(model)[0].register_forward_pre_hook(fails_at_the_third)
    with pytest.raises(KeyError, match="the third"):
        run(model)
    hook.remove()
    assert right(model, expected)


def test_gradients_are_those_of_the_depths_that_ran() -> None:
    model = albert()
    by_hand(model, attention=[1], mlp=[2]).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    slimformer.patch(model, LayerDrop(attention=[1], mlp=[2]))
    found = checkpoint(lambda: model(**GIVEN).last_hidden_state, use_reentrant=False)
    found.square().sum().backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_computed_again_outside_of_its_call_is_refused() -> None:
    model = albert()
    slimformer.patch(model, LayerDrop(attention=[1]))
    layer = order(model)[0]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)
    # Tensors are recomputed when the gradient is, behind the call.
    loss = model(**GIVEN).last_hidden_state.square().sum()
    with pytest.raises(SlimformerError, match="again for gradient checkpointing"):
        loss.backward()


def test_a_layer_that_is_called_by_itself_is_refused_where_a_depth_counts() -> None:
    model = albert()
    slimformer.patch(model, LayerDrop(attention=[1]))
    with pytest.raises(SlimformerError, match="it was called by itself"):
        order(model)[0](torch.randn(1, 3, 32))
    slimformer.patch(model, TempScale(0.5))
    assert order(model)[0](torch.randn(1, 3, 32)).shape == (1, 3, 32)


@pytest.mark.parametrize("depth", [3, 5])
def test_a_config_that_is_changed_under_a_patch_is_refused(depth: int) -> None:
    model = slimformer.patch(albert(), LayerDrop(attention=[1]))
    model.config.num_hidden_layers = depth
    with pytest.raises(SlimformerError, match="Unpatch the model before its config"):
        run(model)


def test_compiled_graphs_leave_out_the_same() -> None:
    model = albert()
    drop = LayerDrop(attention=[1], block=[2])
    expected = by_hand(model, attention=[1], block=[2])
    compiled = torch.compile(slimformer.patch(model, drop), backend="eager", fullgraph=True)
    assert right(compiled, expected)
    assert right(compiled, expected)
    assert right(model, expected)


def test_what_has_weights_of_its_own_cannot_stand_at_one_depth() -> None:
    model = albert()
    whole = run(model)
    state = [set(vars(m)) for m in model.modules()]
    mean = {"attention.1.bias": torch.ones(32), "attention.2.bias": torch.zeros(32)}
    head = {"head.weight": torch.eye(32), "head.bias": torch.zeros(32)}
    for method in (LayerDrop(attention=[1, 2], replace="mean", weights=mean), EarlyExit(2, weights=head)):
        with pytest.raises(UnsupportedModelError, match="nothing with weights can stand in its place"):
            slimformer.patch(model, method)
        assert [set(vars(m)) for m in model.modules()] == state
    with pytest.raises(UnsupportedModelError, match="Tokens cannot be left out"):
        slimformer.patch(model, TokenElimination({1: 0.5}))
    assert torch.equal(run(model), whole)


def test_weights_that_all_depths_share_are_not_repaired() -> None:
    with pytest.raises(CalibrationError, match="cannot be repaired"):
        repair(albert(), Plan([LayerDrop(attention=[1])]))


def test_a_plan_counts_depths(tmp_path: Path) -> None:
    model = albert()
    assert fingerprint(model)["layers"] == 4
    Plan([LayerDrop(attention=[3])], fingerprint(model)).save_pretrained(tmp_path)
    expected = by_hand(model, attention=[3])
    assert right(slimformer.patch(model, str(tmp_path)), expected)
    with pytest.raises(PlanError, match="layers"):
        slimformer.patch(albert(num_hidden_layers=6), str(tmp_path))
    with pytest.raises(PlanError, match="AlbertModel has 4 layers"):
        slimformer.patch(model, LayerDrop(attention=[4]))


def test_a_model_with_a_head_is_patched_through_its_stack() -> None:
    torch.manual_seed(0)
    model = AlbertForMaskedLM(albert().config).eval()
    with slimformer.patched(model, EarlyExit(0)):
        x = model.albert.encoder.embedding_hidden_mapping_in(model.albert.embeddings(GIVEN["input_ids"]))
        assert torch.equal(model(**GIVEN).logits, model.predictions(x))


class Adding(AlbertTransformer):
    """Adds the embeddings again behind every call of the layer."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        first = x = self.embedding_hidden_mapping_in(hidden_states)
        for _ in range(self.config.num_hidden_layers):
            x = self.albert_layer_groups[0](x, attention_mask, **kwargs) + first
        return BaseModelOutput(last_hidden_state=x)


def test_a_stack_that_adds_between_the_calls_of_its_layer_is_refused() -> None:
    model = albert()
    model.encoder.__class__ = Adding
    whole = run(model)
    with pytest.raises(UnsupportedModelError, match="what one call returns is not what the next one gets"):
        slimformer.patch(model)
    assert torch.equal(run(model), whole)


def test_a_call_count_that_the_config_does_not_explain_is_refused() -> None:
    model = albert(num_hidden_layers=3, num_hidden_groups=2)
    model.config.num_hidden_groups = 1
    with pytest.raises(UnsupportedModelError, match="not all of them are called"):
        slimformer.patch(model)


def test_layers_whose_weights_are_not_in_memory_are_refused() -> None:
    with torch.device("meta"):
        model = AlbertModel(albert().config)
    with pytest.raises(UnsupportedModelError, match="its weights are not in memory"):
        slimformer.support(model)

"""Routers decide token by token which sublayers compute it, the same way in a prompt and in a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.methods.test_token_elimination import ids, mask_of, not_evicted, only
from torch import Tensor, nn
from transformers import DynamicCache

import slimformer
from slimformer import LayerDrop, MixtureOfDepths, Plan, TokenElimination
from slimformer.errors import PlanError
from slimformer.methods.mixture_of_depths import router_name
from slimformer.model.anatomy import find_anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.patching import keep_ratios
from slow_rows import LAYOUTS, batch, error, one_thread, outputs, positions, rows_through, slowly, small  # noqa: F401
from tiny_models import DECODERS, ENCODERS, tiny_model

CLOSE = 1e-5


def routed(hidden: int = 32, **fields: Any) -> MixtureOfDepths:
    """Random routers that let about half of the tokens pass."""
    method = MixtureOfDepths.keeping_everything(hidden, **fields)
    generator = torch.Generator().manual_seed(4)
    weights = {
        name: torch.randn(t.shape, generator=generator) if name.endswith("weight") else torch.zeros(1)
        for name, t in method.weights.items()
    }
    return MixtureOfDepths(**fields, weights=weights)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_routers_that_keep_everything_change_nothing(name: str) -> None:
    model = small(name)
    method = MixtureOfDepths.keeping_everything(32, attention=[0, 2], mlp=[1, 3])
    for layout in LAYOUTS:
        given = batch(name, layout)
        dense = outputs(slimformer.unpatch(model), given)
        slimformer.patch(model, method)
        assert error(outputs(model, given), dense, given["attention_mask"]) <= CLOSE


class Decisions:
    """What the routers of a method say of an unpatched model's own sublayer inputs, noted while it runs."""

    def __init__(self, model: nn.Module, method: MixtureOfDepths) -> None:
        self.scores: dict[tuple[int, Kind], Tensor] = {}
        self.masks: dict[tuple[int, Kind], Tensor] = {}
        anatomy = find_anatomy(model)
        self.hooks = []
        for kind, index in method.sublayers:
            norm = anatomy.structure.parts(kind).norm_before
            name = router_name(method.shared, kind, index)

            def note(
                module: Any, args: Any, out: Tensor, kind: Kind = kind, index: int = index, name: str = name
            ) -> None:
                score = out.float() @ method.weights[f"{name}.weight"] + method.weights[f"{name}.bias"]
                self.scores[index, kind], self.masks[index, kind] = score, score > 0

            self.hooks.append(getattr(anatomy.layers[index], norm).register_forward_hook(note))

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("shared", ["sublayer", "layer", "all"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_routing_is_all_tokens_of_which_the_routed_count(name: str, shared: Any) -> None:
    model = small(name)
    method = routed(attention=[1, 2], mlp=[1, 3], shared=shared)
    for layout in LAYOUTS:
        given = batch(name, layout)
        masks: dict[tuple[int, Kind], Tensor] = {}
        # Each sublayer's decision needs those before it: one pass of the slow model more for each.
        for kind, index in sorted(method.sublayers, key=lambda s: (s[1], KINDS.index(s[0]))):
            decisions = Decisions(model, method)
            with slowly(model, masks):
                outputs(model, given)
            decisions.close()
            masks[index, kind] = decisions.masks[index, kind]
        with slowly(model, masks):
            expected = outputs(model, given)
        with slimformer.patched(model, method):
            actual = outputs(model, given)
        assert error(actual, expected, given["attention_mask"]) <= CLOSE
        assert error(actual, outputs(model, given), given["attention_mask"]) > 0.05


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_neox"])
def test_a_token_takes_the_same_way_in_a_prompt_and_in_a_step(name: str) -> None:
    model, mask = small(name), mask_of(0, 5, 11, tokens=24)
    slimformer.patch(model, routed(attention=[0, 2], mlp=[1, 2, 3]))
    place = positions(mask)
    with torch.no_grad():
        whole = model(ids()[:, :24], attention_mask=mask, position_ids=place).logits
        cache, got = DynamicCache(config=model.config), []
        for start, end in ((0, 14), (14, 20), *((t, t + 1) for t in range(20, 24))):
            out = model(
                ids()[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=place[:, start:end],
                past_key_values=cache,
                use_cache=True,
            )
            got.append(out.logits)
    steps = torch.cat(got, 1)
    torch.testing.assert_close(steps[mask.bool()], whole[mask.bool()], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        # Neither later tokens nor batch mates are looked at.
        alone = model(ids()[1:2, 5:20]).logits
    torch.testing.assert_close(whole[1, 5:20], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_top_k_takes_its_share_of_every_text(name: str) -> None:
    model, mask = small(name), mask_of(0, 5, 11, tokens=24)
    method = routed(mlp=[2], routing="top_k", keep=0.25)
    layer = find_anatomy(model).layers[2]
    first = layer.mlp.gate_proj if name == "llama" else layer.intermediate.dense
    with torch.no_grad(), slimformer.patched(model, method), rows_through(first) as counts:
        given = {"position_ids": positions(mask)} if name == "llama" else {}
        model(ids()[:, :24], attention_mask=mask, **given)
    assert counts == [round(24 / 4) + round(19 / 4) + round(13 / 4)]


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_sequences_go_one_way_by_the_mean_of_their_scores(name: str) -> None:
    model, mask = small(name), mask_of(0, 5, 11, tokens=24)
    method = routed(mlp=[2], per="sequence")
    given = {"input_ids": ids()[:, :24], "attention_mask": mask}
    if name == "llama":
        given["position_ids"] = positions(mask)
    weight = method.weights["mlp.2.weight"]
    anatomy = find_anatomy(model)
    inputs: list[Tensor] = []
    norm = anatomy.structure.mlp.norm_before
    # BERT's router reads the residual itself, which is what its MLP gets.
    source = anatomy.layers[2].intermediate if norm is None else getattr(anatomy.layers[2], norm)
    hook = source.register_forward_hook(lambda m, args, out: inputs.append(args[0] if norm is None else out))
    dense = outputs(model, given)
    hook.remove()
    score = inputs[0].float() @ weight
    mean = (score * mask).sum(1) / mask.sum(1)
    # A threshold between the texts, so that some pass by and some do not.
    middle = mean.sort().values[:2].mean()
    weights = {"mlp.2.weight": weight, "mlp.2.bias": -middle[None]}
    method = MixtureOfDepths(mlp=[2], per="sequence", weights=weights)
    keep = (mean > middle)[:, None].expand_as(mask)
    with slowly(model, {(2, "mlp"): keep}):
        expected = outputs(model, given)
    with slimformer.patched(model, method):
        assert error(outputs(model, given), expected, mask) <= CLOSE
    assert error(expected, dense, mask) > 1e-3


@pytest.mark.parametrize("fields", [{"routing": "top_k"}, {"per": "sequence"}])
def test_what_looks_at_whole_texts_does_not_go_on_with_them(fields: dict[str, Any]) -> None:
    model = slimformer.patch(small("llama"), routed(attention=[1], **fields))
    with torch.no_grad():
        first = model(ids(1, 12), use_cache=True)
        for more in (1, 4):
            with pytest.raises(PlanError, match="continues one that is in the cache"):
                model(ids(1, 12)[:, :more], past_key_values=first.past_key_values)


def test_status_says_how_many_rows_were_computed() -> None:
    model, text = small("llama"), ids(2, 24)
    method = routed(attention=[1], mlp=[2])
    slimformer.patch(model, method)
    assert slimformer.status(model)[1]["attention"] == "chosen rows"
    decisions = {}
    with torch.no_grad():
        model(text)
    for kind, index in method.sublayers:
        decisions[index, kind] = keep_ratios(model)[index, kind]
    first = slimformer.status(model)[1]["attention"]
    assert first == f"chosen rows, {decisions[1, 'attention']:.1%} in the last call"
    slimformer.unpatch(model)
    noted = Decisions(model, method)
    with torch.no_grad():
        model(text)
    noted.close()
    assert decisions[1, "attention"] == pytest.approx(float(noted.masks[1, "attention"].float().mean()))
    # A later call replaces it.
    with torch.no_grad(), slimformer.patched(model, method):
        model(text)
        model(text[:1, :1])
        assert keep_ratios(model)[1, "attention"] in (0.0, 1.0)


def test_a_step_that_no_token_takes_reads_no_weight() -> None:
    model, text = small("llama"), ids(2, 21)
    never = {f"{kind}.1.weight": torch.zeros(32) for kind in KINDS}
    never |= {f"{kind}.1.bias": -torch.ones(1) for kind in KINDS}
    slimformer.patch(model, MixtureOfDepths(attention=[1], mlp=[1], weights=never))
    layer = find_anatomy(model).layers[1]
    with torch.no_grad():
        whole = model(text).logits[:, -1]
        cache = model(text[:, :20], use_cache=True).past_key_values
        for linear in (layer.self_attn.q_proj, layer.self_attn.o_proj, *layer.mlp.children()):
            if isinstance(linear, nn.Linear):
                linear.weight.fill_(float("nan"))
        step = model(text[:, 20:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=1e-4)


def test_protected_tokens_are_always_computed() -> None:
    model, text = small("llama"), ids(1, 24)
    never = MixtureOfDepths(mlp=[1], weights={"mlp.1.weight": torch.zeros(32), "mlp.1.bias": -torch.ones(1)})
    protect = torch.zeros(1, 24, dtype=torch.bool)
    protect[0, [3, 9, 20]] = True
    with torch.no_grad():
        with slowly(model, {(1, "mlp"): protect}):
            expected = model(text).logits
        slimformer.patch(model, never)
        with never.protecting(protect):
            torch.testing.assert_close(model(text).logits, expected, atol=1e-5, rtol=1e-5)
            first = model(text[:, :12], use_cache=True)
            second = model(text[:, 12:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(second, expected[:, 12:], atol=1e-4, rtol=1e-4)


def test_it_composes_with_dropping_and_elimination() -> None:
    model, text = small("llama"), ids(1, 24)
    method = routed(mlp=[3])
    elimination = TokenElimination({2: 0.5}, scorer="random", least=8, window=3, sink=2)
    with torch.no_grad():
        slimformer.patch(model, LayerDrop(attention=[1]), elimination, method)
        slim = model(text).logits[0, -1]
        slimformer.patch(model, LayerDrop(attention=[1]), method)
        with only(model, 2, not_evicted(24, 0.5)):
            expected = model(text, use_cache=False).logits[0, -1]
    torch.testing.assert_close(slim, expected, atol=1e-5, rtol=1e-5)


def test_generate_and_plans_and_undo(tmp_path: Path) -> None:
    model = tiny_model("llama")
    method = routed(attention=[1, 2], mlp=[2])
    with torch.no_grad():
        dense = model(ids()).logits
        slimformer.patch(model, method)
        slim = model(ids()).logits
        generated = model.generate(ids()[:, :20], max_new_tokens=6, do_sample=False, pad_token_id=0)
        again = model.generate(ids()[:, :20], max_new_tokens=6, do_sample=False, pad_token_id=0, num_beams=1)
        assert torch.equal(generated, again)
        Plan([method]).save_pretrained(tmp_path)
        slimformer.patch(model, tmp_path)
        assert torch.equal(model(ids()).logits, slim)
        assert torch.equal(slimformer.unpatch(model)(ids()).logits, dense)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mlp": [1, 1]}, "each once"),
        ({"mlp": [-1]}, "from 0 up"),
        ({"mlp": [1], "keep": 0.0}, "above 0 and up to 1"),
        ({"mlp": [1], "routing": "best"}, "one of threshold, top_k"),
        ({"mlp": [1], "shared": "some"}, "one of sublayer, layer, all"),
        ({"mlp": [1], "per": "word"}, "one of token, sequence"),
        ({"mlp": [1], "tokens": "some"}, "one of all, image"),
        ({"mlp": [1], "per": "sequence", "routing": "top_k"}, "decides on whole texts"),
        ({"mlp": [1]}, "no router for mlp 1"),
        (
            {"mlp": [1], "weights": {"mlp.1.weight": torch.zeros(2, 2), "mlp.1.bias": torch.zeros(1)}},
            "damaged",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        MixtureOfDepths(**fields)


def test_a_method_without_layers_is_for_calibration_alone() -> None:
    with pytest.raises(PlanError, match=r"at least one layer.* chooses them"):
        slimformer.patch(tiny_model("llama"), MixtureOfDepths(keep=0.5))


def test_routers_for_another_model_are_refused() -> None:
    with pytest.raises(PlanError, match="hidden size of 48, and LlamaModel has 32"):
        slimformer.patch(tiny_model("llama"), routed(48, mlp=[1]))
    with pytest.raises(PlanError, match="allowed are 0 to 3"):
        slimformer.patch(tiny_model("llama"), routed(mlp=[9]))

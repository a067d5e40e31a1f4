"""Calibration finds what can be dropped, fits what is left behind, and says how it came to it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import slimformer
from slimformer import LayerDrop, Plan
from slimformer.calibration.drops.fitting import fit_each, fit_together
from slimformer.calibration.drops.replay import executors, finish, record_call, run_layers
from slimformer.calibration.drops.search import Search, Step
from slimformer.calibration.drops.stopping import Seconds, Stop
from slimformer.errors import CalibrationError, DataError
from slimformer.model.anatomy import find_anatomy
from tiny_checkpoints import tiny_tokenizer
from tiny_models import DECODERS, ENCODERS, tiny_model

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "no", "dog", "run"]
TEXTS = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(60)) for i in range(80)]


def ids(rows: int = 2, tokens: int = 12) -> Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(1))


def output(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_replaying_the_layers_gives_the_models_own_output(name: str) -> None:
    model = tiny_model(name)
    anatomy = find_anatomy(model)
    batch = {"input_ids": ids(), "attention_mask": torch.ones_like(ids())}
    batch["attention_mask"][0, 9:] = 0
    call = record_call(anatomy, batch)
    states: list[Tensor] = []
    last = run_layers(executors(anatomy, {}), call, call.hidden, 0, states)
    replayed = run_layers(executors(anatomy, {}), call, states[2], 2)
    got = finish(model, anatomy, call, replayed)
    got = got.logits if hasattr(got, "logits") else got.last_hidden_state
    torch.testing.assert_close(got, output(model, **batch), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(replayed, last)
    assert "forward" not in vars(anatomy.layers[0])


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt_neox", "bert", "distilbert", "modernbert"])
def test_a_fit_is_the_least_squares_solution(name: str, kind: str) -> None:
    model = tiny_model(name)
    anatomy = find_anatomy(model)
    batch = {"input_ids": ids(8, 40), "attention_mask": torch.ones(8, 40, dtype=torch.long)}
    batch["attention_mask"][0, 30:] = 0
    call = record_call(anatomy, batch)
    fitted = fit_each(anatomy, [call], [(kind, 1)], {}, "filter", 1)[kind, 1]
    layer = executors(anatomy, {})[1]
    states: list[Tensor] = []
    with torch.no_grad():
        run_layers(executors(anatomy, {}), call, call.hidden, 0, states)
        read = states[1]
        if kind == "mlp" and not layer.parallel:
            read = read + layer.difference("attention", read, call.arguments[1])
        real = batch["attention_mask"].bool()
        x = layer.normed(kind, read)[real].double()
        y = layer.difference(kind, read, call.arguments[1])[real].double()
        # Errors count in parts of the residual that the next norm divides by.
        scale = (read[real].double() + y).square().mean(-1, keepdim=True).rsqrt()
        ones = torch.ones(len(x), 1, dtype=torch.double)
        best = torch.linalg.lstsq(torch.cat([x, ones], 1) * scale, y * scale).solution
        least = ((torch.cat([x, ones], 1) @ best - y) * scale).norm()
        got = ((x @ fitted.weight.T.double() + fitted.bias.double() - y) * scale).norm()
        mean = ((y - y.mean(0)) * scale).norm()
    assert least <= got <= least + 0.05 * mean
    assert got < mean


def test_a_mean_is_the_mean_without_padding_in_parts_of_the_residual() -> None:
    model = tiny_model("bert")
    anatomy = find_anatomy(model)
    mask = torch.ones_like(ids())
    mask[0, 5:] = 0
    call = record_call(anatomy, {"input_ids": ids(), "attention_mask": mask})
    (fitted,) = fit_each(anatomy, [call], [("attention", 0)], {}, "mean", 1).values()
    with torch.no_grad():
        added = executors(anatomy, {})[0].difference("attention", call.hidden, call.arguments[0])
        after = (call.hidden + added)[mask.bool()]
    weight = after.square().mean(-1, keepdim=True).reciprocal()
    mean = (weight * added[mask.bool()]).sum(0) / weight.sum()
    torch.testing.assert_close(fitted.bias, mean, atol=1e-6, rtol=1e-5)


def test_fitting_together_takes_back_what_earlier_removals_shifted() -> None:
    model = tiny_model("llama")
    anatomy = find_anatomy(model)
    call = record_call(anatomy, {"input_ids": ids(16, 40)})
    chosen = [("attention", 0), ("attention", 2)]
    with torch.no_grad():
        dense = run_layers(executors(anatomy, {}), call, call.hidden, 0)
        errors = {}
        for name, dropped in {
            "together": fit_together(anatomy, [call], chosen, "filter", 2),
            "nothing": dict.fromkeys(chosen),
        }.items():
            errors[name] = (run_layers(executors(anatomy, dropped), call, call.hidden, 0) - dense).norm()
    assert errors["together"] < 0.8 * errors["nothing"]


@pytest.mark.parametrize("replace", ["nothing", "mean", "filter"])
@pytest.mark.parametrize("selection", ["cosine", "greedy"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "bert"])
def test_the_plan_does_what_calibration_saw(name: str, selection: str, replace: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    before = copy.deepcopy(model.state_dict())
    plan = slimformer.calibrate(
        model, tiny_tokenizer(), LayerDrop(replace=replace, taps=2), data=TEXTS, selection=selection, drop=2
    )
    assert len(plan.methods[0].attention) == 2
    assert [step["kind"] for step in plan.provenance["steps"]] == ["attention"] * 2
    plan.save_pretrained(tmp_path)
    dense = output(model, input_ids=ids())
    with slimformer.patched(model, Plan.from_pretrained(tmp_path)):
        slim = output(model, input_ids=ids())
    assert torch.isfinite(slim).all()
    assert not torch.equal(slim, dense)
    assert torch.equal(output(model, input_ids=ids()), dense)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_sublayer_that_does_nothing_goes_first() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    for selection in ("cosine", "greedy"):
        plan = slimformer.calibrate(
            model,
            tiny_tokenizer(),
            LayerDrop,
            data=TEXTS,
            selection=selection,
            kinds=("attention", "mlp"),
            drop=2,
        )
        assert plan.methods[0] == LayerDrop(attention=[2], mlp=[1])
    assert plan.provenance["steps"][1]["divergence"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("kinds", [("mlp",), ("block",), ("attention", "mlp")])
def test_every_kind_can_be_dropped(kinds: tuple[str, ...]) -> None:
    plan = slimformer.calibrate(
        tiny_model("qwen2"), tiny_tokenizer(), LayerDrop, data=TEXTS, kinds=kinds, drop=2
    )
    assert {step["kind"] for step in plan.provenance["steps"]} <= set(kinds)
    assert sum(len(getattr(plan.methods[0], kind)) for kind in ("attention", "mlp", "block")) == 2


def test_the_same_seed_gives_the_same_plan_and_training_mode_stays() -> None:
    model, options = tiny_model("llama").train(), {"data": TEXTS, "drop": 2}
    method = LayerDrop(replace="filter", taps=2)
    first, second = (slimformer.calibrate(model, tiny_tokenizer(), method, **options) for _ in range(2))
    assert first.to_dict() == second.to_dict()
    assert all(torch.equal(t, second.tensors()[name]) for name, t in first.tensors().items())
    assert model.training


def test_it_stops_at_a_divergence() -> None:
    options = {"data": TEXTS, "selection": "greedy"}
    all_steps = slimformer.calibrate(
        tiny_model("llama"), tiny_tokenizer(), LayerDrop, drop=3, **options
    ).provenance["steps"]
    limit = (all_steps[1]["divergence"] + all_steps[2]["divergence"]) / 2
    plan = slimformer.calibrate(tiny_model("llama"), tiny_tokenizer(), LayerDrop, max_loss=limit, **options)
    assert plan.provenance["steps"] == all_steps[:2]
    with pytest.raises(CalibrationError, match="Nothing can be dropped within"):
        slimformer.calibrate(tiny_model("llama"), tiny_tokenizer(), LayerDrop, max_loss=1e-12, **options)


def test_it_stops_at_a_speed_or_says_that_it_cannot_be_reached() -> None:
    steps = [Step("attention", layer, None) for layer in range(4)]
    stop = Stop(None, None, speedup=1.25, seconds=Seconds(dense=1.0, saved={"attention": 0.1}))
    assert [stop.reached(steps[:count]) for count in range(4)] == [False, False, True, True]
    with pytest.raises(CalibrationError, match=r"A speed-up of 1000.0 cannot be reached"):
        slimformer.calibrate(tiny_model("llama"), tiny_tokenizer(), LayerDrop, data=TEXTS, speedup=1000.0)


def test_an_interrupted_calibration_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = slimformer.calibrate(tiny_model("llama"), tiny_tokenizer(), LayerDrop, data=TEXTS, drop=3)
    rounds, original = [], Search.next_step

    def interrupted(self: Search, steps: list, candidates: list) -> object:
        rounds.append(len(steps))
        if len(rounds) == 2:
            raise KeyboardInterrupt
        return original(self, steps, candidates)

    monkeypatch.setattr(Search, "next_step", interrupted)
    options = {"data": TEXTS, "drop": 3, "checkpoint": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        slimformer.calibrate(tiny_model("llama"), tiny_tokenizer(), LayerDrop, **options)
    resumed = slimformer.calibrate(tiny_model("llama"), tiny_tokenizer(), LayerDrop, **options)
    assert rounds == [0, 1, 1, 2]
    assert resumed.to_dict() == whole.to_dict()


@pytest.mark.parametrize(("options", "message"), [
    ({}, "Say when to stop"), ({"drop": 0}, "at least 1"), ({"drop": 9, "selection": "cosine"}, "are possible"),
    ({"drop": 9}, "are possible"), ({"drop": 1, "selection": "best"}, "greedy, cosine"),
    ({"drop": 1, "kinds": ("attention", "block")}, "kinds must be"),
    ({"drop": 1, "budget": "huge"}, "quick, standard"),
])  # fmt: skip
def test_wrong_arguments_are_refused(options: dict, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        slimformer.calibrate(tiny_model("llama"), tiny_tokenizer(), LayerDrop, data=TEXTS, **options)


@pytest.mark.parametrize(("name", "kinds", "most"), [
    ("llama", ("attention",), 3), ("llama", ("attention", "mlp"), 7), ("gemma2", ("block",), 3),
    ("bert", ("attention",), 4),
])  # fmt: skip
def test_more_removals_than_can_be_are_refused_before_any_text_is_read(
    name: str, kinds: tuple[str, ...], most: int
) -> None:
    model, options = tiny_model(name), {"kinds": kinds, "selection": "cosine"}
    with pytest.raises(CalibrationError, match=f"at most {most} removals"):
        slimformer.calibrate(model, tiny_tokenizer(), LayerDrop, data="absent.txt", drop=most + 1, **options)
    plan = slimformer.calibrate(model, tiny_tokenizer(), LayerDrop, data=TEXTS, drop=most, **options)
    assert sum(len(getattr(plan.drops[0], unit)) for unit in ("attention", "mlp", "block")) == most


def test_unusable_models_and_texts_are_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(DataError, match="needs"):
        slimformer.calibrate(model, tiny_tokenizer(), LayerDrop, data=["too short"], drop=1)
    with pytest.raises(CalibrationError, match="No tokenizer"):
        slimformer.calibrate(model, None, LayerDrop, data=TEXTS, drop=1)
    with (
        slimformer.patched(model, LayerDrop(mlp=[0])),
        pytest.raises(CalibrationError, match="unpatch first"),
    ):
        slimformer.calibrate(model, tiny_tokenizer(), LayerDrop, data=TEXTS, drop=1)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="not a number"):
        slimformer.calibrate(model, tiny_tokenizer(), LayerDrop, data=TEXTS, drop=1)

"""What is learned beside a frozen model: the loop, predictors, and the search for a schedule of elimination."""

from __future__ import annotations

import copy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slimformer
from slimformer import Plan, TokenElimination
from slimformer.calibration.elimination import prefill_flops
from slimformer.errors import CalibrationError, DataError, PlanError
from slimformer.model.anatomy import find_anatomy
from slimformer.training.loop import EarlyStop, TrainingSettings, fit
from slimformer.training.predictors import learn_predictors, recall
from tiny_checkpoints import tiny_tokenizer
from tiny_models import tiny_model

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "no", "dog", "run"]
TEXTS = [" ".join(WORDS[(i * 7 + j * j) % len(WORDS)] for j in range(400)) for i in range(20)]
ROWS = torch.arange(40).view(10, 4)
SETTINGS = TrainingSettings(steps=12, rows=2, accumulate=2, learning_rate=0.2, keep_every=4, seed=3)


def line() -> nn.Module:
    torch.manual_seed(1)
    return nn.Linear(4, 1)


def loss_of(module: nn.Module, batch: Tensor) -> Tensor:
    x = batch.float() / 40
    return (module(x) - x.sum(1, keepdim=True)).square().mean()


def test_the_loss_falls_and_the_same_seed_gives_the_same_weights() -> None:
    results = []
    for _ in range(2):
        module = line()
        history = fit(module, loss_of, ROWS, SETTINGS, identity={})
        assert history.losses[-1] < history.losses[0] / 2
        results.append((history.losses, module.weight.detach().clone()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = line()
    expected = fit(whole, loss_of, ROWS, SETTINGS, identity={"text": "a"})

    def interrupt(step: int) -> None:
        if step == 6:
            raise KeyboardInterrupt

    first, again = line(), line()
    with pytest.raises(KeyboardInterrupt):
        fit(first, loss_of, ROWS, SETTINGS, identity={"text": "a"}, folder=tmp_path, after_step=interrupt)
    history = fit(again, loss_of, ROWS, SETTINGS, identity={"text": "a"}, folder=tmp_path)
    assert history.losses == expected.losses
    assert torch.equal(again.weight, whole.weight)
    # Another text starts anew.
    other = fit(line(), loss_of, ROWS, SETTINGS, identity={"text": "b"}, folder=tmp_path)
    assert other.losses == expected.losses


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    calls = 0

    def breaks(module: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return loss_of(module, batch) * (float("nan") if calls > 16 else 1.0)

    module = line()
    with pytest.raises(CalibrationError, match=r"nan at step 9\. The last good checkpoint is in") as raised:
        fit(module, breaks, ROWS, SETTINGS, identity={}, folder=tmp_path)
    assert "lower learning rate" in str(raised.value)
    assert len(fit(line(), loss_of, ROWS, SETTINGS, identity={}, folder=tmp_path).losses) == 12


def test_memory_that_runs_out_is_said_with_what_to_change() -> None:
    def full(module: nn.Module, batch: Tensor) -> Tensor:
        raise torch.OutOfMemoryError

    with pytest.raises(CalibrationError, match=r"2 row\(s\) of 4 tokens .* Try rows=1 with accumulate=4"):
        fit(line(), full, ROWS, SETTINGS, identity={})
    with pytest.raises(CalibrationError, match=r"1 row\(s\) of 4 tokens .* Try rows of 2 tokens"):
        fit(line(), full, ROWS, TrainingSettings(rows=1, learning_rate=0.1), identity={})


def test_without_accelerate_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(CalibrationError, match=r"slimformer\[training\]"):
        fit(line(), loss_of, ROWS, SETTINGS, identity={})


@pytest.mark.parametrize(
    "settings", [{"steps": 0}, {"rows": 0}, {"learning_rate": 0.0}, {"warmup": 2.0}, {"precision": "int8"}]
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(CalibrationError, match=next(iter(settings))):
        TrainingSettings(**settings)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "modernbert"])
def test_predictors_learn_and_the_model_does_not(name: str) -> None:
    model = tiny_model(name, max_position_embeddings=512)
    before = copy.deepcopy(model.state_dict())
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 512
    method = TokenElimination(scorer="predictor", revivable=name == "modernbert")
    plan = slimformer.calibrate(
        model,
        tokenizer,
        method,
        schedule={1: 0.5, 2: 0.25},
        data=TEXTS,
        length=384,
        size=24,
        rank=8,
        settings=TrainingSettings(steps=60, learning_rate=3e-3),
    )
    losses, measured = plan.provenance["losses"], plan.measured["predictors"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert set(measured) == {"1", "2"}
    assert 0 <= measured["1"]["recall_all"] <= 1
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    ids = torch.randint(3, 60, (2, 300))
    with torch.no_grad():
        dense = model(ids)[0]
        slimformer.patch(model, plan)
        assert not torch.allclose(model(ids)[0], dense)
        slimformer.unpatch(model)
        assert torch.equal(model(ids)[0], dense)


def test_predictors_and_their_plan_survive_a_checkpoint_and_a_folder(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 512
    given: dict[str, Any] = {
        "schedule": {2: 0.5},
        "data": TEXTS,
        "length": 256,
        "size": 8,
        "rank": 4,
        "settings": TrainingSettings(steps=8, keep_every=4),
    }
    model = tiny_model("llama", max_position_embeddings=512)
    first = learn_predictors(model, tokenizer, checkpoint=tmp_path / "state", **given)
    again = learn_predictors(model, tokenizer, checkpoint=tmp_path / "state", **given)
    first.save_pretrained(tmp_path / "plan")
    loaded = Plan.from_pretrained(tmp_path / "plan")
    for plan in (again, loaded):
        tensors = plan.methods[0].tensors()
        assert all(torch.equal(tensors[name], t) for name, t in first.methods[0].tensors().items())


def test_predictors_refuse_what_they_cannot_learn_from() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(PlanError, match="names layer 9"):
        learn_predictors(model, tokenizer, schedule={9: 0.5}, data=TEXTS)
    with pytest.raises(DataError, match="Give more text"):
        learn_predictors(model, tokenizer, schedule={2: 0.5}, data=["short"], length=128)
    with (
        slimformer.patched(model, TokenElimination({2: 0.5})),
        pytest.raises(CalibrationError, match="Call unpatch first"),
    ):
        learn_predictors(model, tokenizer, schedule={2: 0.5}, data=TEXTS)


def test_recall_counts_blocks_found() -> None:
    target = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0, 0.0]])
    assert recall(target, target, 0.5) == 1.0
    assert recall(-target, target, 0.5) == 0.0
    assert recall(torch.tensor([[9.0, 0.0, 8.0, 7.0, 0.0, 0.0]]), target, 0.5) == pytest.approx(2 / 3)


def schedule_for(
    tmp_path: Path | None, budget: float, method: Any = TokenElimination, **options: Any
) -> Plan:
    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = 512
    return slimformer.calibrate(
        tiny_model("llama", max_position_embeddings=512),
        tokenizer,
        method,
        max_loss=budget,
        data=TEXTS,
        length=300,
        answer=16,
        texts=4,
        keep=(0.8, 0.4),
        layers=(1, 3),
        checkpoint=tmp_path,
        **options,
    )


def test_the_cheapest_schedule_within_the_budget_is_chosen(tmp_path: Path) -> None:
    wide = schedule_for(None, 10.0)
    curve = wide.provenance["curve"]
    assert [(p["layer"], p["keep"]) for p in curve] == [(1, 0.8), (1, 0.4), (3, 0.8), (3, 0.4)]
    assert wide.methods == (TokenElimination({1: 0.4}),)
    between = sorted(p["divergence"] for p in curve)[1]
    narrow = schedule_for(tmp_path, between)
    within = [p for p in curve if p["divergence"] <= between]
    best = min(within, key=lambda p: p["flops"])
    assert narrow.methods == (TokenElimination({best["layer"]: best["keep"]}),)
    assert schedule_for(tmp_path, between).provenance["curve"] == narrow.provenance["curve"]
    assert all(p["recalled"] is not None for p in curve)
    assert all(p["recalled"] is None for p in schedule_for(None, 10.0, recall=False).provenance["curve"])


def test_a_budget_that_nothing_keeps_and_numbers_that_make_no_sense_are_refused() -> None:
    with pytest.raises(CalibrationError, match="No setting stays within 1e-12"):
        schedule_for(None, 1e-12)
    with pytest.raises(CalibrationError, match="above 0"):
        schedule_for(None, 0.0)
    with pytest.raises(CalibrationError, match="a prompt of 300 must be as long"):
        schedule_for(None, 1.0, TokenElimination(least=400))
    with pytest.raises(CalibrationError, match="predicts no tokens"):
        slimformer.calibrate(tiny_model("bert"), tiny_tokenizer(), TokenElimination, data=TEXTS)


def test_flops_are_those_of_the_matrix_products() -> None:
    anatomy = find_anatomy(tiny_model("llama"))
    assert prefill_flops(anatomy, 100, 2, 1.0) == pytest.approx(1.0)
    # Two of four layers; half of the tokens cost half in linear layers and a quarter in attention.
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    linear, scores = weights * 100, 32 * 100 * 100
    expected = (2 * (linear + scores) + 2 * (linear / 2 + scores / 4)) / (4 * (linear + scores))
    assert prefill_flops(anatomy, 100, 2, 0.5) == pytest.approx(expected)


def test_ctrl_c_lets_a_step_finish_and_the_next_run_goes_on_exactly(tmp_path: Path) -> None:
    whole, calls = line(), 0
    expected = fit(whole, loss_of, ROWS, SETTINGS, identity={})

    def pressed(module: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 12:
            signal.raise_signal(signal.SIGINT)
        return loss_of(module, batch)

    again = line()
    with pytest.raises(KeyboardInterrupt):
        fit(line(), pressed, ROWS, SETTINGS, identity={}, folder=tmp_path)
    assert calls == 12
    history = fit(again, loss_of, ROWS, SETTINGS, identity={}, folder=tmp_path)
    assert history.losses == expected.losses
    assert torch.equal(again.weight, whole.weight)


def test_a_gradient_that_is_no_number_never_reaches_a_checkpoint(tmp_path: Path) -> None:
    def breaks(module: nn.Module, batch: Tensor) -> Tensor:
        return loss_of(module, batch) + (module.weight * 0).sum().sqrt()

    module = line()
    before = module.weight.detach().clone()
    with pytest.raises(CalibrationError, match="The gradient is nan at step 1"):
        fit(module, breaks, ROWS, SETTINGS, identity={}, folder=tmp_path)
    assert torch.equal(module.weight, before)


class Falling:
    """A held-out figure that falls for some steps and then rises."""

    def __init__(self, best: int) -> None:
        self.best, self.asked = best, []

    def __call__(self, step: int) -> float:
        self.asked.append(step)
        return abs(step - self.best) + 1.0


def test_training_ends_when_held_out_text_gets_no_better_and_goes_back_to_its_best(tmp_path: Path) -> None:
    settings = TrainingSettings(steps=40, rows=2, learning_rate=0.05, keep_every=4)
    stopped = line()
    seen: dict[int, Tensor] = {}
    history = fit(
        stopped,
        loss_of,
        ROWS,
        settings,
        identity={},
        folder=tmp_path,
        after_step=lambda step: seen.update({step: stopped.weight.detach().clone()}),
        early_stop=EarlyStop(Falling(6), every=3, patience=2),
    )
    assert list(history.held_out) == ["0", "3", "6", "9", "12"]
    assert (history.best, len(history.losses)) == (6, 12)
    assert torch.equal(stopped.weight, seen[6])
    # The same call ends at once, at the same weights.
    again, measure = line(), Falling(6)
    repeated = fit(
        again, loss_of, ROWS, settings, identity={}, folder=tmp_path, early_stop=EarlyStop(measure, 3, 2)
    )
    assert (measure.asked, repeated) == ([], history)
    assert torch.equal(again.weight, seen[6])


def test_a_held_out_figure_that_is_no_number_stops() -> None:
    nan = EarlyStop(lambda step: float("nan") if step == 4 else 1.0, every=4)
    with pytest.raises(CalibrationError, match="Held-out text gives nan after step 4"):
        fit(line(), loss_of, ROWS, SETTINGS, identity={}, early_stop=nan)


def test_another_precision_in_the_same_process() -> None:
    for precision in ("no", "bf16", "no"):
        settings = TrainingSettings(steps=2, learning_rate=0.1, precision=precision)
        assert len(fit(line(), loss_of, ROWS, settings, identity={}).losses) == 2

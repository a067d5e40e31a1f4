"""Rates that fit: found by a range test that is taken back, lowered where they are too high, or none, which is said."""

from __future__ import annotations

import copy
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny_checkpoints import tiny_tokenizer
from tests.tiny_models import tiny_model
from tests.training.test_training import TEXTS
from torch import Tensor, nn

from slimformer import MixtureOfDepths
from slimformer.errors import CalibrationError
from slimformer.training.attempts.attempts import Attempts, Watched, attempted
from slimformer.training.attempts.minutes import Minutes
from slimformer.training.attempts.range_test import CAUTIOUS, RangeTest, range_test
from slimformer.training.loop import TrainingSettings
from slimformer.training.predictors import learn_predictors
from slimformer.training.routing.routers import learn_routers

ROWS = torch.arange(32).view(8, 4)
WANTED = 0.05


def point() -> nn.Linear:
    """Two numbers, which are to come near to others that are not far away."""
    module = nn.Linear(1, 1)
    with torch.no_grad():
        module.weight.fill_(0.0)
        module.bias.fill_(0.0)
    return module


def apart(module: nn.Module, batch: Tensor | None = None) -> Tensor:
    return sum((p - WANTED).square().sum() for p in module.parameters()) + torch.zeros(())


def away(module: nn.Module, batch: Tensor) -> Tensor:
    """What is trained leads away from what is measured."""
    return -apart(module)


def trained(module: nn.Module, loss: Any = apart, rate: Any = "auto", **options: Any) -> Attempts:
    settings = TrainingSettings(steps=40, learning_rate=rate, weight_decay=0.0)
    watched = Watched(lambda: float(apart(module)), lambda: float(apart(module)), 5, 2, 1.5)
    return attempted(module, loss, ROWS, settings, watched, identity={}, **options)


def test_what_is_done_between_steps_is_no_part_of_a_steps_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    module = point()

    def loss(trained: nn.Module, batch: Tensor) -> Tensor:
        clock[0] += 1.0
        return apart(trained)

    def measured() -> float:
        clock[0] += 100.0
        return float(apart(module).detach())

    assert range_test(module, loss, ROWS, TrainingSettings(accumulate=2), measured, count=5).seconds == 2.0


def test_a_range_test_finds_a_rate_and_leaves_the_module_as_it_was() -> None:
    module = point()
    before = copy.deepcopy(module.state_dict())
    found = range_test(
        module, apart, ROWS, TrainingSettings(), lambda: float(apart(module).detach()), count=9
    )
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    assert found.rates[:2] == pytest.approx([1e-5, 10**-4.5])
    assert found.start == pytest.approx(2 * WANTED**2)
    # Faster than needed ends it: the last figure is far above the first.
    assert len(found.figures) == len(found.rates)
    assert min(found.figures) < found.start
    # Adam moves by about the rate: one step of 0.05 would be all, and 0.0316 is the nearest rate.
    assert 2e-3 < found.rate < 0.05


def test_where_no_rate_of_the_range_helps_training_begins_cautiously() -> None:
    assert RangeTest([1e-3, 1e-2], [1.1, 1.4], 1.0, 0.1).rate == CAUTIOUS
    assert RangeTest([], [], math.nan, 0.1).rate == CAUTIOUS


def test_the_rate_that_is_found_trains() -> None:
    module = point()
    done = trained(module)
    assert done.won
    assert done.range_test is not None
    assert done.learning_rate == done.range_test.rate
    assert float(apart(module)) < 0.1 * done.range_test.start
    assert done.to_dict()["range_test"]["held_out"] == done.range_test.figures


def test_a_rate_that_is_too_high_is_lowered_until_it_helps() -> None:
    module = point()
    done = trained(module, rate=20.0)
    assert done.won
    assert [attempt["learning_rate"] for attempt in done.failed] == [20.0, 2.0]
    assert done.learning_rate == 0.2
    assert done.range_test is None
    # A hopeless rate does not use its patience.
    assert all(attempt["steps"] == 5 for attempt in done.failed)
    assert float(apart(module)) < 2 * WANTED**2


def test_where_nothing_helps_the_module_is_as_it_was_and_that_is_said() -> None:
    module = point()
    done = trained(module, away)
    assert not done.won
    assert len(done.failed) == 3
    rates = [*(attempt["learning_rate"] for attempt in done.failed), done.learning_rate]
    assert rates == pytest.approx([CAUTIOUS / 10**n for n in range(4)])
    assert all(float(p.detach().abs().sum()) == 0.0 for p in module.parameters())
    assert done.measured()["won"] is False
    assert done.measured()["after"] == done.measured()["before"]


def test_no_finite_numbers_at_one_rate_are_no_end() -> None:
    module = point()

    def breaks(trained: nn.Module, batch: Tensor) -> Tensor:
        far = max(float(p.detach().abs().max()) for p in trained.parameters())
        return apart(trained) * (math.nan if far > 1 else 1.0)

    done = trained(module, breaks, rate=5.0)
    assert done.won
    assert "The loss is nan" in done.failed[0]["error"]


def test_steps_are_as_many_as_there_is_time_for_and_a_resumed_training_knows_its_rate(tmp_path: Path) -> None:
    module = point()

    def slow(module: nn.Module, batch: Tensor) -> Tensor:
        time.sleep(0.02)
        return apart(module)

    settings = TrainingSettings(steps=100_000)
    watched = Watched(lambda: float(apart(module)), lambda: float(apart(module)), 25)
    done = attempted(
        module, slow, ROWS, settings, watched, identity={}, folder=tmp_path, deadline=time.monotonic() + 1.5
    )
    assert 1 <= len(done.history.losses) < 100
    assert done.won
    again = attempted(point(), apart, ROWS, settings, watched, identity={}, folder=tmp_path)
    assert again.range_test == done.range_test
    assert again.history.losses[: len(done.history.losses)] == done.history.losses


@pytest.mark.parametrize("given", [0, -1.0, math.inf, math.nan, "ten", True])
def test_minutes_that_are_none_are_refused(given: Any) -> None:
    with pytest.raises(CalibrationError, match="minutes must be a number above 0"):
        Minutes(given)


def test_routers_and_predictors_say_whether_they_learnt(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = tiny_model("llama", max_position_embeddings=512), tiny_tokenizer()
    tokenizer.model_max_length = 512
    method = MixtureOfDepths.keeping_everything(32, mlp=[1, 2], keep=0.5)
    plan = learn_routers(
        model,
        tokenizer,
        method,
        data=TEXTS,
        length=48,
        settings=TrainingSettings(steps=30, rows=4, learning_rate=1e-2),
    )
    assert plan.measured["training"]["won"]
    assert plan.measured["training"]["after"] < plan.measured["training"]["before"]
    # A rate at which everything is thrown about, and still is at a thousandth of it.
    plan = learn_predictors(
        model,
        tokenizer,
        schedule={1: 0.5},
        data=TEXTS,
        length=128,
        size=16,
        rank=4,
        settings=TrainingSettings(steps=4, learning_rate=1e5, warmup=0.0),
    )
    assert plan.measured["training"]["won"] is False
    assert [attempt["learning_rate"] for attempt in plan.provenance["failed"]] == [1e5, 1e4, 1e3]
    assert "Training won nothing" in caplog.text

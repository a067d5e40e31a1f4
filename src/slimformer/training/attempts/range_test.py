"""A learning-rate range test (Smith, arXiv 1506.01186): a few steps, each faster than the last, that are taken back."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.text.progress import Stages
from slimformer.training.checkpoint import History
from slimformer.training.loop import Diverged, EarlyStop, TrainingSettings, fit

# Between rates that move nothing and rates that no model survives.
LOWEST, HIGHEST = 1e-5, 1e-1
# How far below the rate at which the figure was lowest: that one is the best for a single step, and hundreds follow.
_BELOW = 3.0
# Where a figure is so many times the first one, faster steps only make it worse.
_WORST = 1.5
# A training in which no rate of the range helped begins here, and goes down from here.
CAUTIOUS = 1e-4


@dataclass(frozen=True)
class RangeTest:
    """What a model became at every rate of the range.

    Attributes:
        rates: The rates, one step each, from the same start on.
        figures: The figure on held-out text behind each step; the lower, the better.
        start: The figure before the first.
        seconds: What a step took, measuring aside.
    """

    rates: list[float]
    figures: list[float]
    start: float
    seconds: float

    @property
    def rate(self) -> float:
        """The rate to train at.

        Example:
            >>> RangeTest([1e-4, 1e-3, 1e-2], [0.9, 0.7, 1.4], 1.0, 0.1).rate
            0.000333
        """
        best = min(range(len(self.figures)), key=self.figures.__getitem__, default=None)
        if best is None or self.figures[best] >= self.start:
            return CAUTIOUS
        return float(f"{self.rates[best] / _BELOW:.3g}")

    def to_dict(self) -> dict[str, Any]:
        """For a plan's provenance."""
        return {"rates": self.rates, "held_out": self.figures, "held_out_before": self.start}


def range_test(
    module: nn.Module,
    loss: Callable[[nn.Module, Tensor], Tensor],
    rows: Tensor,
    settings: TrainingSettings,
    measure: Callable[[], float],
    *,
    count: int,
    lowest: float = LOWEST,
    highest: float = HIGHEST,
    stages: Stages | None = None,
) -> RangeTest:
    """Take steps at rates that grow from step to step, and put the module back.

    Args:
        module: What is trained.
        loss: As for `fit`.
        rows: As for `fit`.
        settings: As for `fit`; their steps and learning rate are not used.
        measure: The figure on text that is not trained on.
        count: How many steps.
        lowest: The first rate.
        highest: The last one.
        stages: Where a progress bar is shown.

    Raises:
        CalibrationError: As `fit`, but not where a high rate gives no finite numbers, which ends the test.
    """
    start = {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}
    rates = [lowest * (highest / lowest) ** (step / max(count - 1, 1)) for step in range(count)]
    begun: list[float] = []
    seconds: list[float] = []

    def timed(trained: nn.Module, batch: Tensor) -> Tensor:
        # The first of a step: what is measured and kept between steps costs more than many a step.
        if len(begun) == len(seconds):
            begun.append(time.monotonic())
        return loss(trained, batch)

    def after(step: int) -> None:
        seconds.append(time.monotonic() - begun[-1])

    def ramp(optimizer: torch.optim.Optimizer, steps: int) -> Any:
        growth = highest / lowest
        # As many moves of the schedule as there are processes come with one step.
        return torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: growth ** (step * count / steps / max(count - 1, 1))
        )

    try:
        history = fit(
            module,
            timed,
            rows,
            dataclasses.replace(settings, steps=count, learning_rate=lowest),
            identity={},
            stages=stages,
            after_step=after,
            early_stop=EarlyStop(lambda step: measure(), every=1, patience=count + 1, worst=_WORST),
            schedule=ramp,
        )
    except Diverged as diverged:
        history = diverged.history
    finally:
        module.load_state_dict(start)
    return _found(history, rates, seconds)


def _found(history: History, rates: list[float], seconds: list[float]) -> RangeTest:
    figures = list(history.held_out.values())
    before = figures[0] if figures else math.nan
    return RangeTest(
        rates[: max(len(figures) - 1, 0)],
        figures[1:],
        before,
        statistics.median(seconds) if seconds else math.inf,
    )

"""When to stop dropping: after a number, before a divergence, or at a speed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from slimformer.calibration.drops.replay import executors, finish, record_call, run_layers
from slimformer.calibration.drops.search import Step, sublayers_of
from slimformer.calibration.drops.similarity import Unit
from slimformer.errors import CalibrationError
from slimformer.model.anatomy import Anatomy

_REPEATS = 5


@dataclass(frozen=True)
class Seconds:
    """Time of one forward: of the dense model, and of what dropping one unit of each kind saves."""

    dense: float
    saved: Mapping[Unit, float]

    def speedup(self, steps: Sequence[Step]) -> float:
        """How many times as fast as dense a forward without these units is."""
        return self.dense / (self.dense - sum(self.saved[step.kind] for step in steps))


@dataclass
class Stop:
    """The stop rules of one calibration; the first that applies ends it."""

    drop: int | None
    max_loss: float | None
    speedup: float | None
    seconds: Seconds | None = None

    def check(self, most: int, kinds: Sequence[Unit]) -> None:
        """Refuse a number of removals that no text allows, before any is measured.

        Args:
            most: How many are possible.
            kinds: What may be dropped.

        Raises:
            CalibrationError: If more are asked for.
        """
        if self.drop is not None and self.drop > most:
            raise CalibrationError(
                f"drop is {self.drop}, and at most {most} removals of the kinds {', '.join(kinds)} are possible in "
                f"this model. Ask for at most {most}, or for other kinds."
            )

    def reached(self, steps: Sequence[Step]) -> bool:
        """Whether enough is dropped."""
        if self.drop is not None and len(steps) >= self.drop:
            return True
        if self.speedup is None or self.seconds is None:
            return False
        return self.seconds.speedup(steps) >= self.speedup

    def too_far(self, divergence: float | None) -> bool:
        """Whether a removal with this divergence must not be made."""
        return self.max_loss is not None and divergence is not None and divergence > self.max_loss

    def give_up(self, steps: Sequence[Step]) -> None:
        """Nothing is left to drop: fine where a divergence was the limit.

        Raises:
            CalibrationError: If a speed-up was asked for that cannot be reached.
        """
        if self.speedup is not None and self.seconds is not None:
            raise CalibrationError(
                f"A speed-up of {self.speedup} cannot be reached by dropping these kinds: with all of them gone it is "
                f"{self.seconds.speedup(steps):.2f}. Ask for less, or allow more kinds."
            )


@torch.no_grad()
def dense_seconds(
    model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Tensor], kinds: Sequence[Unit]
) -> Seconds:
    """Measure a forward over the first row of a batch, dense and without any unit of each kind, in turns."""
    call = record_call(anatomy, {name: tensor[:1] for name, tensor in batch.items()})
    count = len(anatomy.layers)
    variants: dict[Unit | None, list[float]] = {None: [], **{kind: [] for kind in kinds}}
    for repeat in range(_REPEATS + 1):
        for kind, times in variants.items():
            gone = [] if kind is None else [s for index in range(count) for s in sublayers_of(kind, index)]
            layers = executors(anatomy, dict.fromkeys(gone))
            _wait(anatomy)
            begin = time.perf_counter()
            finish(model, anatomy, call, run_layers(layers, call, call.hidden, 0))
            _wait(anatomy)
            if repeat:  # the first warms up
                times.append(time.perf_counter() - begin)
    dense = median(variants[None])
    return Seconds(dense, {kind: max(dense - median(variants[kind]), 0.0) / count for kind in kinds})


def _wait(anatomy: Anatomy) -> None:
    if anatomy.stack.device.type == "cuda":
        torch.cuda.synchronize(anatomy.stack.device)

"""Training at a rate that fits: found by a range test, and lowered where no step is better than none."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.errors import CalibrationError
from slimformer.text.progress import Stages
from slimformer.training.attempts.range_test import LOWEST, RangeTest, range_test
from slimformer.training.checkpoint import History
from slimformer.training.loop import Diverged, EarlyStop, TrainingSettings, fit

LOWERED, _LOWER = 3, 10.0
# Steps of a range test: one in so many of the training's, but enough to tell the rates apart.
_ONE_IN, _FEWEST, _MOST = 16, 9, 17
# Steps that only tell how long one takes.
_TIMED = 2
_FILE = "range_test.json"


@dataclass(frozen=True)
class Watched:
    """What tells whether a training helps.

    Attributes:
        measure: The figure on text that is not trained on; the lower, the better.
        quick: The same on a part of that text, for the range test.
        every: Steps between measurements.
        patience: So many measurements without a better one end an attempt.
        worst: A figure so many times the first one ends an attempt, too.
    """

    measure: Callable[[], float]
    quick: Callable[[], float]
    every: int
    patience: int = 4
    worst: float = math.inf


@dataclass(frozen=True)
class Attempts:
    """What was tried.

    Attributes:
        history: Of the last attempt.
        learning_rate: Its rate.
        range_test: What found the first rate; None where it was given.
        failed: The attempts before, in which no step was better than none: rate, steps, and figures or an error.
    """

    history: History
    learning_rate: float
    range_test: RangeTest | None = None
    failed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def won(self) -> bool:
        """Whether a step was better than none."""
        return self.history.best > 0

    def measured(self) -> dict[str, Any]:
        """For a plan's `measured`: whether anything was learnt, and the figures that say so."""
        figures = self.history.held_out
        return {"won": self.won, "before": figures["0"], "after": figures[str(self.history.best)]}

    def to_dict(self) -> dict[str, Any]:
        """For a plan's provenance."""
        found: dict[str, Any] = {**dataclasses.asdict(self.history), "best": self.history.best}
        found["learning_rate"] = self.learning_rate
        if self.range_test is not None:
            found["range_test"] = self.range_test.to_dict()
        if self.failed:
            found["failed"] = self.failed
        return found


def attempted(
    module: nn.Module,
    loss: Callable[[nn.Module, Tensor], Tensor],
    rows: Tensor,
    settings: TrainingSettings,
    watched: Watched,
    *,
    identity: Mapping[str, Any],
    folder: str | os.PathLike[str] | None = None,
    stages: Stages | None = None,
    after_step: Callable[[int], Any] | None = None,
    deadline: float = math.inf,
) -> Attempts:
    """Train `module` in place, three times more at a tenth of the rate where no step is better than none.

    Args:
        module: As for `fit`.
        loss: As for `fit`.
        rows: As for `fit`.
        settings: As for `fit`; a learning rate `"auto"` is found by a range test.
        watched: What tells whether it helps.
        identity: As for `fit`.
        folder: As for `fit`.
        stages: As for `fit`.
        after_step: As for `fit`.
        deadline: When to be done, by `time.monotonic`; steps are then as many as there is time for, up to those of the
            settings.

    Returns:
        What was tried. Where no attempt helped, the module is as it was.

    Raises:
        CalibrationError: As `fit`; if figures are no finite numbers, only where the lowest rate does not help.
    """
    start = {name: tensor.detach().to("cpu", copy=True) for name, tensor in module.state_dict().items()}
    place = None if folder is None else Path(folder)
    found = _ranged(module, loss, rows, settings, watched, identity, place, stages, deadline)
    rate = settings.learning_rate
    tested = found if rate == "auto" else None
    rate = found.rate if found is not None and rate == "auto" else float(rate)
    failed: list[dict[str, Any]] = []
    while True:
        steps = _steps(settings, watched, found, deadline)
        trained = dataclasses.replace(settings, steps=steps, learning_rate=rate)
        try:
            history = fit(
                module,
                loss,
                rows,
                trained,
                identity={**identity, "learning_rate": rate},
                folder=place if place is None or not failed else place / f"lower-{len(failed)}",
                stages=stages,
                after_step=after_step,
                early_stop=EarlyStop(
                    lambda step: watched.measure(), watched.every, watched.patience, watched.worst
                ),
                deadline=deadline,
            )
        except Diverged as diverged:
            if len(failed) == LOWERED:
                raise
            module.load_state_dict(start)
            what: dict[str, Any] = {"error": str(diverged), "steps": len(diverged.history.losses)}
        else:
            done = Attempts(history, rate, tested, failed)
            if done.won or len(failed) == LOWERED or _over(deadline):
                return done
            what = {"held_out": history.held_out, "steps": len(history.losses)}
        failed.append({"learning_rate": rate, **what})
        rate = float(f"{rate / _LOWER:.3g}")


def _ranged(
    module: nn.Module,
    loss: Callable[[nn.Module, Tensor], Tensor],
    rows: Tensor,
    settings: TrainingSettings,
    watched: Watched,
    identity: Mapping[str, Any],
    folder: Path | None,
    stages: Stages | None,
    deadline: float,
) -> RangeTest | None:
    """The range test of this training, from its folder where it was done before; None where none is needed."""
    rate = settings.learning_rate
    if rate != "auto" and deadline == math.inf:
        return None
    known = json.loads(json.dumps(dict(identity)))
    file = None if folder is None else folder / _FILE
    if file is not None:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            if content.pop("identity") == known:
                return RangeTest(**content)
        except (OSError, ValueError, LookupError, TypeError):
            pass  # none, or one cut short: it is done anew
    if deadline == math.inf:
        timed, attainable = None, settings.steps
    else:
        slow = LOWEST if rate == "auto" else float(rate)
        begun = time.monotonic()
        timed = range_test(
            module,
            loss,
            rows,
            settings,
            watched.quick,
            count=_TIMED,
            lowest=slow,
            highest=slow,
            stages=stages,
        )
        # Each of its steps is measured, as those of the range test are.
        each = (time.monotonic() - begun) / (_TIMED + 1)
        left = _agreed(max(deadline - time.monotonic(), 0.0) / each)
        attainable = min(settings.steps, int(left))
    found = timed
    if rate == "auto":
        count = min(max(attainable // _ONE_IN, _FEWEST), _MOST)
        found = range_test(module, loss, rows, settings, watched.quick, count=count, stages=stages)
    if found is None:
        return None
    found = dataclasses.replace(found, seconds=_agreed(found.seconds))
    if file is not None and _first_process():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"identity": known, **dataclasses.asdict(found)}), encoding="utf-8")
        except OSError as error:
            raise CalibrationError(
                f"The range test cannot be kept in {file.parent}: {error}. Give another folder."
            ) from error
    return found


def _steps(settings: TrainingSettings, watched: Watched, found: RangeTest | None, deadline: float) -> int:
    """As many steps as there is time for."""
    if found is None or deadline == math.inf:
        return settings.steps
    begun = time.monotonic()
    watched.measure()
    each = found.seconds + (time.monotonic() - begun) / watched.every
    left = deadline - time.monotonic()
    return min(settings.steps, max(int(_agreed(left / each)), 1))


def _over(deadline: float) -> bool:
    return _agreed(float(time.monotonic() > deadline)) > 0


def _several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _first_process() -> bool:
    return not _several() or torch.distributed.get_rank() == 0


def _agreed(value: float) -> float:
    """The mean over all processes of a training, which have to do the same."""
    if not _several():
        return value
    device = "cpu" if torch.distributed.get_backend() == "gloo" else f"cuda:{torch.cuda.current_device()}"
    found = torch.tensor(value, device=device, dtype=torch.float32)
    torch.distributed.all_reduce(found)
    return float(found) / torch.distributed.get_world_size()

"""Options that the commands share that train something: how long, how fast, on how much at a time."""

# torch is imported when a command runs, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from slimformer.training.loop import TrainingSettings


class Precision(str, Enum):
    """What is trained in."""

    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


HoldOut = Annotated[bool, typer.Option(help="Measure on every fifth text, which is not trained on.")]
Length = Annotated[int, typer.Option(min=16, help="Tokens per row.")]
Steps = Annotated[int, typer.Option(min=1, help="Updates.")]
Rows = Annotated[int, typer.Option(min=1, help="Rows of text at a time.")]
Accumulate = Annotated[int, typer.Option(min=1, help="Batches per update.")]
LearningRate = Annotated[float, typer.Option(help="Its peak.")]
PrecisionOption = Annotated[
    Precision,
    typer.Option("--precision", help="Mixed precision; no is float32, or what the weights are held in."),
]


def training_settings(
    steps: int, rows: int, accumulate: int, learning_rate: float, precision: Precision, seed: int
) -> TrainingSettings:
    """The options as the training loop takes them.

    Raises:
        CalibrationError: If one is not allowed.
    """
    from slimformer.training.loop import TrainingSettings

    return TrainingSettings(
        steps=steps,
        rows=rows,
        accumulate=accumulate,
        learning_rate=learning_rate,
        precision=precision.value,
        seed=seed,
    )

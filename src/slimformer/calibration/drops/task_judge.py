"""Judge removals by what embeddings are for: the share of a task's figure that is lost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slimformer.calibration.drops.replay import Dropped, saved_weights
from slimformer.decisions.replacements import Replace
from slimformer.errors import CalibrationError
from slimformer.evaluation.embedding_tasks import EmbeddingTask
from slimformer.methods.layer_drop import LayerDrop
from slimformer.patching import patched


@dataclass
class TaskJudge:
    """Patches the pipeline itself with every candidate, and encodes the task anew.

    Attributes:
        pipeline: A SentenceTransformer, unpatched.
        task: What is measured.
        replace: What dropped sublayers leave behind.
        taps: How many inputs a filter reads.
        dense: The figure of the dense model.
    """

    pipeline: Any
    task: EmbeddingTask
    replace: Replace
    taps: int
    dense: float

    @classmethod
    def record(cls, pipeline: Any, task: EmbeddingTask, replace: Replace, taps: int) -> TaskJudge:
        """Measure the dense model.

        Raises:
            CalibrationError: If its figure is not above 0, or it is no SentenceTransformer.
        """
        own = task.recorded(pipeline)
        (dense,) = own.scores(pipeline)
        if dense <= 0:
            raise CalibrationError(
                f"The dense {task.name} is {dense:.4g}, and of that no share can be lost. Check the data."
            )
        return cls(pipeline, own, replace, taps, dense)

    @property
    def name(self) -> str:
        """What is measured."""
        return f"share lost of the dense {self.task.name}"

    def begin(self, dropped: Dropped) -> None:
        """Nothing: every candidate encodes from the first layer on."""

    def divergence(self, dropped: Dropped, start: int) -> Mapping[str, float]:
        """The share lost; below 0 where the slim model does better."""
        layers = {kind: [index for of, index in dropped if of == kind] for kind in ("attention", "mlp")}
        taps = self.taps if self.replace == "filter" else 1
        method = LayerDrop(**layers, replace=self.replace, taps=taps, weights=saved_weights(dropped))
        with patched(self.pipeline, method):
            (score,) = self.task.scores(self.pipeline)
        return {"": 1 - score / self.dense}

"""One lesson of a repair: the dense model teaches what one plan leaves open."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from slimformer.decisions.registry import tensors_of
from slimformer.errors import CalibrationError
from slimformer.methods.weight_delta import WeightDelta
from slimformer.model.anatomy import find_anatomy, transformer_of
from slimformer.patching import patched
from slimformer.plans.plan import Plan, PlannedMethod
from slimformer.text.progress import Stages
from slimformer.training.attempts.attempts import Attempts, Watched, attempted
from slimformer.training.distillation import Distillation
from slimformer.training.loop import TrainingSettings, frozen
from slimformer.training.trained_weights import TrainedWeights, What, changed_layers

# A plan that is nearer to dense than this changes nothing that could be won back.
_NOTHING = 1e-6
# Training at a rate that is far too high ends before it has used its patience.
_WORST = 1.5
# Batches that a range test measures on.
_QUICK = 4


@dataclass
class Lesson:
    """What is the same in every round.

    Attributes:
        model: The unpatched model.
        rows: What is trained on.
        held_out: Batches that are not.
        what: See `slimformer.repair`.
        near: See `slimformer.repair`.
        rank: See `slimformer.repair`.
        hidden: See `slimformer.repair`.
        settings: See `slimformer.repair`.
        every: See `slimformer.repair`.
        patience: See `slimformer.repair`.
        recompute: Compute layers again in the backward pass.
        expected: What the dense model makes of the held-out batches, by their numbers, once it is known.
    """

    model: Any
    rows: Tensor
    held_out: Sequence[Tensor]
    what: Sequence[What]
    near: int | None
    rank: int
    hidden: float
    settings: TrainingSettings
    every: int
    patience: int
    recompute: bool = False
    expected: dict[int, Tensor] = field(default_factory=dict)

    @staticmethod
    def check(model: Any, plan: Plan, what: Sequence[What], near: int | None, rank: int) -> None:
        """Refuse a plan that leaves nothing of that kind to train.

        Raises:
            CalibrationError: If it leaves nothing.
        """
        with patched(model, plan), frozen(transformer_of(model)):
            weights = TrainedWeights(find_anatomy(transformer_of(model)), plan, what, near, rank)
            if weights.adapters is not None:
                weights.adapters.take_out()

    def teach(
        self,
        plan: Plan,
        *,
        identity: Mapping[str, Any],
        folder: Path | None,
        stages: Stages,
        deadline: float,
    ) -> tuple[list[PlannedMethod], Attempts]:
        """Train what a plan leaves open; the model is unpatched before and after."""
        inner = transformer_of(self.model)
        torch.manual_seed(self.settings.seed)
        weights = None
        with patched(self.model, plan), frozen(inner):
            try:
                anatomy = find_anatomy(inner)
                weights = TrainedWeights(anatomy, plan, self.what, self.near, self.rank)
                decisions = plan.decisions(anatomy)
                layers = changed_layers(anatomy, plan, decisions) if self.hidden else ()
                student = Distillation(
                    self.model, plan, weights, self.hidden, layers, self.expected, self.recompute
                )
                before = student.divergence(self.held_out)
                if before < _NOTHING:
                    raise CalibrationError(
                        f"There is nothing to repair: on rows of {self.rows.shape[-1]} tokens the plan is as far from "
                        f"dense as {before:.1e}. Elimination acts on long texts only: give a greater length."
                    )
                some = quick(len(self.held_out))
                done = attempted(
                    weights,
                    student.loss,
                    self.rows,
                    self.settings,
                    Watched(
                        lambda: student.divergence(self.held_out),
                        lambda: student.divergence(self.held_out, some),
                        self.every,
                        self.patience,
                        _WORST,
                    ),
                    identity=identity,
                    folder=folder,
                    stages=stages,
                    deadline=deadline,
                )
                return (merged(weights.repaired(plan)) if done.won else list(plan.methods)), done
            finally:
                if weights is not None and weights.adapters is not None:
                    weights.adapters.take_out()


def quick(batches: int) -> list[int]:
    """Which of these batches a range test measures on, spread over all.

    Example:
        >>> quick(12), quick(3), quick(1)
        ([0, 3, 6, 9], [0, 1], [0])
    """
    count = max(min(batches, 2), min(_QUICK, batches // 3))
    return [number * batches // count for number in range(count)]


def with_learnt(methods: Sequence[PlannedMethod], learnt: Sequence[PlannedMethod]) -> list[PlannedMethod]:
    """A round's methods with what earlier rounds have learnt."""
    known = {
        (type(method).__name__, name): tensor
        for method in learnt
        for name, tensor in tensors_of(method).items()
    }
    found: list[Any] = [m for m in methods if not (learnt and isinstance(m, WeightDelta))]
    for place, method in enumerate(found):
        lead = type(method).__name__
        weights = {name: known.get((lead, name), tensor) for name, tensor in tensors_of(method).items()}
        if weights:
            found[place] = dataclasses.replace(method, weights=weights)
    return [*found, *(method for method in learnt if isinstance(method, WeightDelta))]


def merged(methods: Sequence[PlannedMethod]) -> list[PlannedMethod]:
    """The methods with at most one change of weights, at the end."""
    deltas = [method for method in methods if isinstance(method, WeightDelta)]
    others = [method for method in methods if not isinstance(method, WeightDelta)]
    return [*others, functools.reduce(WeightDelta.followed_by, deltas)] if deltas else others


def digest(plan: Plan) -> str:
    """SHA-256 over a plan's methods and their weights."""
    content = json.dumps(plan.to_dict()["methods"], sort_keys=True).encode()
    return hashlib.sha256(content + safetensors.torch.save(plan.tensors())).hexdigest()

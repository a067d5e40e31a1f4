"""What a plan leaves of every sublayer, in the words that formats outside of slimformer have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from slimformer.decisions.policy import Decision
from slimformer.decisions.replacements import weight_names
from slimformer.errors import ExportError
from slimformer.methods.early_exit import EarlyExit
from slimformer.methods.layer_drop import LayerDrop
from slimformer.methods.narrow_mlp import NarrowMlp
from slimformer.methods.weight_delta import WeightDelta
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.plans.plan import Plan

_HELD = (LayerDrop, EarlyExit, WeightDelta)


@dataclass(frozen=True)
class Remains:
    """What is left of a model.

    Attributes:
        count: How many layers it had.
        dropped: The sublayers that are not computed.
        added: What stands in their place: a bias `[hidden]` and, for a filter, a matrix `[hidden, hidden]`.
        changes: What repair made of parameters, by layer and name within the layer.
    """

    count: int
    dropped: frozenset[tuple[int, Kind]]
    added: dict[tuple[int, Kind], tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    changes: dict[tuple[int, str], list[Callable[[Tensor], Tensor]]] = field(default_factory=dict)

    @property
    def layers(self) -> list[int]:
        """The layers of which anything is left, in order."""
        return [i for i in range(self.count) if not all(self.gone(i, kind) for kind in KINDS)]

    @property
    def whole(self) -> bool:
        """Whether those are whole, so that a shorter model of the same architecture is all there is."""
        return not any((index, kind) in self.dropped for index in self.layers for kind in KINDS)

    def gone(self, layer: int, kind: Kind) -> bool:
        """Whether nothing is left of a sublayer."""
        return (layer, kind) in self.dropped and (layer, kind) not in self.added

    def describe(self) -> str:
        """What is dropped beside whole blocks, for messages."""
        parts = []
        for kind in KINDS:
            plain = [i for i in self.layers if self.gone(i, kind)]
            replaced = [i for i in self.layers if (i, kind) in self.added]
            if plain:
                parts.append(f"{kind} {_listed(plain)} dropped")
            if replaced:
                parts.append(f"{kind} {_listed(replaced)} replaced by a mean or a filter")
        return ", ".join(parts) or "whole blocks dropped"


def what_remains(plan: Plan, anatomy: Anatomy) -> Remains:
    """Read a plan for a model.

    Args:
        plan: The plan.
        anatomy: The model's, whose weights need not be in memory.

    Raises:
        PlanError: If the plan is another model's.
        ExportError: If a method of it is none that a checkpoint can hold, or no layer is left.
    """
    for method in plan.methods:
        if not isinstance(method, _HELD):
            raise ExportError(_cannot_hold(method))
    dropped: set[tuple[int, Kind]] = set()
    added: dict[tuple[int, Kind], tuple[Tensor, Tensor | None]] = {}
    changes: dict[tuple[int, str], list[Callable[[Tensor], Tensor]]] = {}
    for (layer, kind), decision in plan.decisions(anatomy).items():
        for name, changed in decision.changes:
            changes.setdefault((layer, name), []).append(changed)
        if decision.compute:
            continue
        dropped.add((layer, kind))
        if decision.weights:
            added[layer, kind] = _one_tap(decision, layer, kind)
    remains = Remains(len(anatomy.layers), frozenset(dropped), added, changes)
    if not remains.layers:
        raise ExportError(
            "The plan leaves no layer, and a checkpoint needs at least one. Drop fewer, or exit later."
        )
    return remains


def _one_tap(decision: Decision, layer: int, kind: Kind) -> tuple[Tensor, Tensor | None]:
    matrix, bias = (decision.weights.get(name) for name in weight_names(kind))
    if bias is None:
        raise ExportError(f"What stands in place of {kind} {layer} is nothing that a checkpoint can hold.")
    if matrix is not None and matrix.shape[0] != matrix.shape[1]:
        taps = matrix.shape[1] // matrix.shape[0]
        raise ExportError(
            f"The filter in place of {kind} {layer} reads {taps} tokens, and no format holds more than one. "
            "Calibrate with taps=1 or replace='mean'."
        )
    return bias, matrix


def _cannot_hold(method: Any) -> str:
    name = type(method).__name__
    remedy = "Leave it out of the plan"
    if isinstance(method, NarrowMlp):
        return (
            "NarrowMlp puts a linear layer beside each narrow MLP, and no config can say so. Leave it out of the plan, "
            "or drop whole blocks instead."
        )
    return (
        f"{name} decides while the model runs, and a checkpoint holds only what is decided once: LayerDrop, EarlyExit "
        f"and repair's WeightDelta. {remedy}; what repair learnt beside it no longer fits then, so repair again "
        "without it."
    )


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))

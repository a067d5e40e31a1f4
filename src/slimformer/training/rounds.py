"""Progressive slimming: the sublayers that a plan drops, in rounds, so that the model is repaired in between."""

from __future__ import annotations

import dataclasses
import math

from slimformer.calibration.drops.similarity import UNITS
from slimformer.errors import CalibrationError
from slimformer.methods.layer_drop import LayerDrop
from slimformer.model.layer_parts import KINDS
from slimformer.plans.plan import Plan, PlannedMethod
from slimformer.report.summary import Summary


def in_rounds(plan: Plan, rounds: int) -> list[Plan]:
    """Plans that drop more and more, of which the last is the plan itself.

    Sublayers go in the order in which calibration removed them, where the plan tells it, else in the order of its
    lists.

    Args:
        plan: The plan.
        rounds: How many.

    Raises:
        CalibrationError: If there are more rounds than sublayers that `LayerDrop` removes.

    Example:
        >>> plans = in_rounds(Plan([LayerDrop(attention=[5, 3], mlp=[4])]), 2)
        >>> [plan.dropped("attention") for plan in plans]
        [(5, 3), (5, 3)]
        >>> [plan.dropped("mlp") for plan in plans]
        [(), (4,)]
    """
    if rounds == 1:
        return [plan]
    order = [
        (step.kind, step.layer)
        for step in Summary.of(plan).steps
        if any(step.layer in getattr(method, step.kind) for method in plan.drops)
    ]
    if rounds < 1 or rounds > len(order):
        raise CalibrationError(
            f"rounds must be from 1 to the number of removals, {len(order)}, got {rounds}. Rounds divide what "
            "LayerDrop removes."
        )
    return [
        _dropping(plan, set(order[: math.ceil(len(order) * number / rounds)]))
        for number in range(1, rounds + 1)
    ]


def _dropping(plan: Plan, taken: set[tuple[str, int]]) -> Plan:
    methods: list[PlannedMethod] = []
    for method in plan.methods:
        if not isinstance(method, LayerDrop):
            methods.append(method)
            continue
        attention, mlp, block = (
            tuple(layer for layer in getattr(method, unit) if (unit, layer) in taken) for unit in UNITS
        )
        if attention or mlp or block:
            fewer = dataclasses.replace(method, attention=attention, mlp=mlp, block=block)
            methods.append(_with_its_weights_only(fewer))
    return dataclasses.replace(plan, methods=methods)


def _with_its_weights_only(method: LayerDrop) -> LayerDrop:
    leads = tuple(f"{kind}.{layer}." for kind in KINDS for layer in method.dropped(kind))
    weights = {name: tensor for name, tensor in method.weights.items() if name.startswith(leads)}
    return dataclasses.replace(method, weights=weights)

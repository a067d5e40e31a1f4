"""What repair trains: what a plan added, norms and biases, and low-rank adapters, all as differences from the start."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slimformer.decisions.policy import Decision
from slimformer.errors import CalibrationError
from slimformer.methods.weight_delta import ADDED, LEFT, RIGHT, WeightDelta
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.plans.plan import Plan, PlannedMethod
from slimformer.training.adapters import Adapters

What = Literal["added", "norms", "lora"]
WHAT: tuple[What, ...] = ("added", "norms", "lora")
# AdamW moves every number by about the learning rate; the numbers of a fitted matrix are ten times smaller than those
# of a norm.
_MATRIX_STEP = 0.1


class _Trained(NamedTuple):
    """A tensor that is trained as a difference.

    Attributes:
        name: Where the patched stack has it.
        start: What it was.
        step: How much one unit of the difference counts.
        of: The number of the method it belongs to, and its name there; or None and its name from its layer on.
    """

    name: str
    start: Tensor
    step: float
    of: tuple[int | None, str]


class TrainedWeights(nn.Module):
    """The trained tensors of a patched model.

    Args:
        anatomy: The model's, patched with `plan`.
        plan: What it is patched with.
        what: What is trained: `"added"`, `"norms"`, `"lora"`.
        near: How many layers below and above a change count as near it; None for all layers.
        rank: Of the adapters.

    Raises:
        CalibrationError: If there is nothing of that kind to train.
    """

    def __init__(
        self, anatomy: Anatomy, plan: Plan, what: Sequence[What], near: int | None, rank: int
    ) -> None:
        super().__init__()
        decisions = plan.decisions(anatomy)
        lead = next(name for name, module in anatomy.stack.named_modules() if module is anatomy.layers)
        nearby = _nearby(anatomy, plan, decisions, near)
        trained: list[_Trained] = []
        if "added" in what:
            trained += _added(anatomy, plan, decisions, lead)
        small = _small(anatomy, decisions, nearby) if "norms" in what else {}
        linear = _linear(anatomy, decisions, nearby) if "lora" in what else []
        self.adapters = Adapters(anatomy.layers, linear, rank) if linear else None
        names = {id(parameter): name for name, parameter in anatomy.stack.named_parameters()}
        trained += [_Trained(names[id(p)], p.detach(), 1.0, (None, name)) for name, p in small.items()]
        if not trained and not linear:
            raise CalibrationError(
                f"The plan leaves nothing to train of {', '.join(what)}. What can be trained: added (filters, means "
                "and heads, where the plan has any), norms, lora (linear layers near what was changed)."
            )
        self.trained = trained
        self.differences = nn.ParameterList(torch.zeros_like(t.start, dtype=torch.float32) for t in trained)
        self.factors = nn.ParameterList([] if self.adapters is None else self.adapters.parameters())

    def forward(self, run: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Run a function of the trained tensors by name: a wrapper for several GPUs sees their gradients."""
        return run(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """What `torch.func.functional_call` is to put in place of the stack's own, in the dtypes of these."""
        return {
            t.name: self._value(t, difference)
            for t, difference in zip(self.trained, self.differences, strict=True)
        }

    def repaired(self, plan: Plan) -> list[PlannedMethod]:
        """The plan's methods with what was trained."""
        methods: list[Any] = list(plan.methods)
        delta: dict[str, Tensor] = {}
        for t, difference in zip(self.trained, self.differences, strict=True):
            number, name = t.of
            if number is None:
                delta[f"{name}.{ADDED}"] = (difference.detach() * t.step).cpu()
                continue
            old = methods[number]
            value = self._value(t, difference).detach().to("cpu", old.weights[name].dtype)
            methods[number] = dataclasses.replace(old, weights={**old.weights, name: value})
        for name, (left, right) in ({} if self.adapters is None else self.adapters.products()).items():
            # Half the size, and its rounding is far below that of what is added.
            delta[f"{name}.weight.{LEFT}"] = left.to("cpu", torch.bfloat16)
            delta[f"{name}.weight.{RIGHT}"] = right.to("cpu", torch.bfloat16)
        return [*methods, WeightDelta(delta)] if delta else methods

    @staticmethod
    def _value(t: _Trained, difference: Tensor) -> Tensor:
        return (t.start.float() + t.step * difference).to(t.start.dtype)


def changed_layers(anatomy: Anatomy, plan: Plan, decisions: dict[tuple[int, Kind], Decision]) -> list[int]:
    """The layers in which a plan leaves something uncomputed, up to its exit; all of them where it changes scores."""
    end = len(anatomy.layers) if plan.exit is None else plan.exit
    leaving = min((layer for (layer, _), d in decisions.items() if d.not_evicted), default=end)
    found = {layer for (layer, _), d in decisions.items() if (not d.compute or d.rows) and layer < end}
    found |= set(range(leaving, end))
    if plan.exit is not None and end:
        found.add(end - 1)
    return sorted(found) or list(range(end))


def _nearby(
    anatomy: Anatomy, plan: Plan, decisions: dict[tuple[int, Kind], Decision], near: int | None
) -> list[int]:
    changed = changed_layers(anatomy, plan, decisions)
    layers = range(len(anatomy.layers))
    if near is None:
        return list(layers)
    return [layer for layer in layers if any(abs(layer - other) <= near for other in changed)]


def _added(
    anatomy: Anatomy, plan: Plan, decisions: dict[tuple[int, Kind], Decision], lead: str
) -> list[_Trained]:
    """What stands in for sublayers, found in the methods that gave it."""
    homes = {
        id(tensor): (number, name)
        for number, method in enumerate(plan.methods)
        for name, tensor in getattr(method, "weights", {}).items()
    }
    found = []
    for (index, _), decision in sorted(decisions.items()):
        for name, tensor in decision.weights.items():
            start = anatomy.layers[index].get_buffer(name)
            step = _MATRIX_STEP if start.dim() > 1 else 1.0
            found.append(_Trained(f"{lead}.{index}.{name}", start, step, homes[id(tensor)]))
    return found


def _parts(
    anatomy: Anatomy, decisions: dict[tuple[int, Kind], Decision], layers: Sequence[int]
) -> list[tuple[str, nn.Module]]:
    """The modules of all sublayers that compute something in these layers, from their layer's number on."""
    found = {}
    for index in layers:
        for kind in KINDS:
            if decisions.get((index, kind), Decision()).compute:
                layer = anatomy.layers[index]
                for child in sorted(anatomy.structure.parts(kind).children_of(layer)):
                    found[f"{index}.{child}"] = layer.get_submodule(child)
    return list(found.items())


def _small(
    anatomy: Anatomy, decisions: dict[tuple[int, Kind], Decision], layers: Sequence[int]
) -> dict[str, nn.Parameter]:
    """Norms and biases."""
    return {
        f"{lead}.{name}": parameter
        for lead, module in _parts(anatomy, decisions, layers)
        for name, parameter in module.named_parameters()
        if parameter.dim() == 1
    }


def _linear(
    anatomy: Anatomy, decisions: dict[tuple[int, Kind], Decision], layers: Sequence[int]
) -> list[str]:
    """Linear layers."""
    return [
        f"{lead}.{name}".removesuffix(".")
        for lead, part in _parts(anatomy, decisions, layers)
        for name, module in part.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    ]

"""MLPs with fewer hidden units in an encoder's place of the whole ones (arXiv 2204.09656, 2302.04089)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimformer.decisions.fields import checked_weights, checked_width, is_whole
from slimformer.decisions.policy import Decision
from slimformer.decisions.registry import register
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import Kind

# Of every layer: the input of the units that stayed, their output, and what a linear layer beside them does.
PARTS = ("up.weight", "up.bias", "down.weight", "linear.weight", "linear.bias")
HEAD = ("head.weight", "head.bias")


@register("NarrowMlp")
@dataclass(frozen=True)
class NarrowMlp:
    """Whole MLPs compute no token; narrow ones with a linear layer beside them stand there instead.

    For post-norm encoders such as BERT. With `x` the residual, the sublayer becomes
    `norm(linear(x) + down(activation(up(x))))`, where `norm` and `activation` are the model's own. At the last layer
    a linear head may follow, as in `EarlyExit`. `slimformer.calibrate` chooses the units and fits the rest in closed
    form.

    Attributes:
        units: Layer to how many hidden units stay; 0 leaves the linear layer alone.
        weights: For every layer `"3.up.weight"` `[units, hidden]`, `"3.up.bias"` `[units]`, `"3.down.weight"`
            `[hidden, units]`, `"3.linear.weight"` `[hidden, hidden]` and `"3.linear.bias"` `[hidden]`; with a head
            `"head.weight"` `[hidden, hidden]` and `"head.bias"` `[hidden]` too.

    Raises:
        PlanError: If no layer is named, a layer or a number of units is not an integer from 0 up, or a weight is
            missing, unknown or of another shape.

    Example:
        >>> zeros = {"up.weight": (2, 16), "up.bias": (2,), "down.weight": (16, 2), "linear.weight": (16, 16),
        ...          "linear.bias": (16,)}
        >>> NarrowMlp({1: 2}, {f"1.{name}": torch.zeros(shape) for name, shape in zeros.items()})
        NarrowMlp(units={1: 2})
    """

    units: Mapping[int, int]
    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        try:
            # JSON knows no keys but strings.
            units = {int(layer): number for layer, number in dict(self.units).items()}
        except (OverflowError, TypeError, ValueError):
            units = {-1: -1}
        counts = [*units, *units.values()]
        if not units or not all(is_whole(n, least=0) for n in counts):
            raise PlanError(
                f"NarrowMlp(units=...) takes layers and how many units of each stay, such as {{3: 384}}, both from 0 "
                f"up; got {self.units!r}."
            )
        object.__setattr__(self, "units", units)
        checked_weights("NarrowMlp", self.weights)
        bias = next((t for name, t in self.weights.items() if name.endswith("linear.bias")), None)
        if bias is None:
            raise PlanError(
                "NarrowMlp has no fitted weights. slimformer.calibrate(model, None, NarrowMlp, ...) makes them."
            )
        expected = _shapes(units, bias.numel(), HEAD[0] in self.weights)
        found = {name: tuple(tensor.shape) for name, tensor in self.weights.items()}
        for name in (*expected, *found):
            if found.get(name) != expected.get(name):
                raise PlanError(
                    f"NarrowMlp(weights=...): {name} has the shape {found.get(name, 'none, it is missing')}; it must "
                    f"be {expected.get(name, 'left out')}."
                )

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """No rows for the MLPs that are narrowed, which leave the narrow one."""
        check_narrows(anatomy)
        name, count = type(anatomy.stack).__name__, len(anatomy.layers)
        hidden = self.weights[f"{min(self.units)}.linear.bias"].numel()
        if max(self.units) >= count:
            raise PlanError(
                f"NarrowMlp names layer {max(self.units)}, but {name} has {count} layers: allowed are 0 to {count - 1}."
            )
        checked_width(
            f"The narrow MLP of layer {min(self.units)}", hidden, anatomy.stack.config.hidden_size, name
        )
        headed = HEAD[0] in self.weights
        if headed and count - 1 not in self.units:
            raise PlanError(
                f"NarrowMlp has a head, which stands behind layer {count - 1} of {name}, and leaves that layer's MLP "
                "whole. Narrow it too, or leave the head out."
            )
        plans: dict[tuple[int, Kind], Decision] = {}
        for layer in self.units:
            own = {part: self.weights[f"{layer}.{part}"] for part in PARTS}
            if headed and layer == count - 1:
                own.update((part, self.weights[part]) for part in HEAD)
            plans[layer, "mlp"] = Decision(
                False,
                partial(_narrow, own.keys(), self.units[layer] > 0),
                {_buffer(part): tensor for part, tensor in own.items()},
            )
        return plans

    def tensors(self) -> dict[str, Tensor]:
        """What a plan saves beside the JSON."""
        return dict(self.weights)

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON."""
        return {"units": {str(layer): number for layer, number in self.units.items()}}


def check_narrows(anatomy: Anatomy) -> None:
    """Raise unless the MLPs are BERT's, a linear layer with an activation and a linear layer with a norm.

    Raises:
        UnsupportedModelError: If they are others.
    """
    for layer in anatomy.layers:
        first, second = (getattr(layer, name, None) for name in ("intermediate", "output"))
        linear = all(isinstance(getattr(part, "dense", None), nn.Linear) for part in (first, second))
        if not (
            linear and callable(getattr(first, "intermediate_act_fn", None)) and hasattr(second, "LayerNorm")
        ):
            raise UnsupportedModelError(
                f"NarrowMlp takes the MLPs of BERT, RoBERTa and MPNet, and {type(layer).__name__} has others: "
                f"{', '.join(name for name, _ in layer.named_children())}. LayerDrop(mlp=[...], replace='filter') "
                "works for every structure."
            )


def _shapes(units: Mapping[int, int], hidden: int, head: bool) -> dict[str, tuple[int, ...]]:
    square, vector = (hidden, hidden), (hidden,)
    shapes: dict[str, tuple[int, ...]] = dict(zip(HEAD, (square, vector), strict=True)) if head else {}
    for layer, number in units.items():
        of_parts = ((number, hidden), (number,), (hidden, number), square, vector)
        shapes.update((f"{layer}.{part}", shape) for part, shape in zip(PARTS, of_parts, strict=True))
    return shapes


def _buffer(part: str) -> str:
    return f"slimformer_{part.replace('.', '_')}"


def _narrow(parts: Any, some: bool, layer: nn.Module, causal: bool, slot: int) -> NarrowSublayer:
    return NarrowSublayer(layer, some, HEAD[0] in parts)


@dataclass
class NarrowSublayer:
    """Adds to the residual what makes it the narrow MLP's output, token by token.

    Attributes:
        layer: The layer that holds the weights, as buffers that are not saved with the model.
        some: Whether any unit stayed.
        head: Whether a linear head follows.
    """

    layer: nn.Module
    some: bool
    head: bool
    by_row = True

    def __call__(self, residual: Tensor, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The addition to the residual `[..., hidden]`."""
        get, layer = self._weight, self.layer
        y = F.linear(residual, get("linear.weight"), get("linear.bias"))
        if self.some:
            up = F.linear(residual, get("up.weight"), get("up.bias"))
            h = layer.get_submodule("intermediate").intermediate_act_fn(up)  # type: ignore[operator]
            y = torch.addmm(y.flatten(0, -2), h.flatten(0, -2), get("down.weight").T).view(y.shape)
        y = layer.get_submodule("output").LayerNorm(y)  # type: ignore[operator]
        if self.head:
            y = y + F.linear(y, get("head.weight"), get("head.bias"))
        return y - residual

    def _weight(self, part: str) -> Tensor:
        weight: Tensor = getattr(self.layer, _buffer(part))
        return weight

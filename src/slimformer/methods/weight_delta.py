"""What repair has changed in a model's own weights: low-rank products and small vectors, merged when patched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slimformer.decisions.fields import checked_weights, layer_number
from slimformer.decisions.policy import Decision
from slimformer.decisions.registry import register
from slimformer.errors import PlanError
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import KINDS, Kind

LEFT, RIGHT, ADDED = "left", "right", "added"


@register("WeightDelta")
@dataclass(frozen=True)
class WeightDelta:
    """Weights of layers become `W + left @ right` (LoRA, arXiv 2106.09685), or `w + added` for norms and biases.

    The sums are formed once, when the model is patched, so that nothing is slower for them; the tensors that the model
    had are kept aside, and `unpatch` puts those very tensors back.

    Attributes:
        weights: By layer and parameter, such as `"3.self_attn.q_proj.weight.left"` `[rows, rank]`,
            `"3.self_attn.q_proj.weight.right"` `[rank, columns]` and `"3.input_layernorm.weight.added"` `[hidden]`;
            `slimformer.repair` makes them.

    Raises:
        PlanError: If there is none, or a name or a pair of shapes is none of those.

    Example:
        >>> WeightDelta({"3.input_layernorm.weight.added": torch.zeros(16)}).parameters
        ('3.input_layernorm.weight',)
    """

    weights: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        checked_weights("WeightDelta", self.weights)
        if not self.weights:
            raise PlanError("WeightDelta changes no weight. `slimformer repair` makes one that does.")
        for name in self.weights:
            parameter, _, part = name.rpartition(".")
            layer, _, inside = parameter.partition(".")
            if part not in (LEFT, RIGHT, ADDED) or not isinstance(layer_number(layer), int) or not inside:
                raise PlanError(
                    f"WeightDelta takes names such as 3.mlp.up_proj.weight.left, .right or .added; got {name!r}."
                )
        for parameter in self.parameters:
            of = self._of(parameter)
            shapes = [of[end].shape for end in (LEFT, RIGHT) if end in of]
            product = set(of) == {LEFT, RIGHT} and all(len(shape) == 2 for shape in shapes)
            if not (set(of) == {ADDED} or (product and shapes[0][1] == shapes[1][0])):
                raise PlanError(
                    f"The change of {parameter} is damaged: it takes {LEFT} [rows, rank] with {RIGHT} [rank, columns], "
                    f"or {ADDED} alone. Repair the plan again."
                )

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that change, each once."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.weights))

    def followed_by(self, later: WeightDelta) -> WeightDelta:
        """Both changes in one."""
        weights = dict(self.weights)
        for name, tensor in later.weights.items():
            if name not in weights:
                weights[name] = tensor
            elif name.endswith(ADDED):
                weights[name] = weights[name] + tensor
            else:
                weights[name] = torch.cat([weights[name], tensor], 1 if name.endswith(LEFT) else 0)
        return WeightDelta(weights)

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """The changes of every sublayer.

        Raises:
            PlanError: If a layer does not exist, or no sublayer has the part.
        """
        count, name = len(anatomy.layers), type(anatomy.stack).__name__
        changes: dict[tuple[int, Kind], list[tuple[str, Callable[[Tensor], Tensor]]]] = {}
        for parameter in self.parameters:
            layer, _, inside = parameter.partition(".")
            part = inside.partition(".")[0]
            kind = next((k for k in KINDS if part in anatomy.structure.parts(k).children()), None)
            if int(layer) >= count or kind is None:
                raise PlanError(
                    f"WeightDelta names {parameter}, and {name} has {count} layers of the structure "
                    f"{anatomy.structure.name!r}. It was made for another model."
                )
            changes.setdefault((int(layer), kind), []).append(
                (inside, partial(_changed, parameter, self._of(parameter)))
            )
        return {sublayer: Decision(changes=tuple(of)) for sublayer, of in changes.items()}

    def _of(self, parameter: str) -> dict[str, Tensor]:
        names = {end: f"{parameter}.{end}" for end in (LEFT, RIGHT, ADDED)}
        return {end: self.weights[name] for end, name in names.items() if name in self.weights}

    def settings(self) -> dict[str, Any]:
        """What a plan saves in the JSON: nothing but the method's name."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What a plan saves beside the JSON."""
        return dict(self.weights)


def _changed(name: str, of: Mapping[str, Tensor], old: Tensor) -> Tensor:
    """The new values in the dtype of the old ones; the sum is formed in float32."""
    # Before the product is formed: two long vectors would make a matrix that no memory holds.
    shape = tuple(of[ADDED].shape) if ADDED in of else (of[LEFT].shape[0], of[RIGHT].shape[1])
    if shape != tuple(old.shape):
        raise PlanError(
            f"The change of {name} has the shape {shape}, and the model's parameter {tuple(old.shape)}. "
            "The plan was made for another model."
        )
    parts = {end: tensor.to(old.device, torch.float32) for end, tensor in of.items()}
    delta = parts[ADDED] if ADDED in parts else parts[LEFT] @ parts[RIGHT]
    return (old.float() + delta).to(old.dtype)

"""The patched layer: every sublayer asks its policies which rows to compute, and computes those.

A layer that no method touches keeps its own `forward`. A layer that one does gets `LayerExecutor.forward`, which
calls the layer's own modules by name at each step, so that adapters and quantised weights put there later are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from slimformer.anatomy import KINDS, Anatomy, Kind, Structure, positional_names
from slimformer.cache import layer_cache, leave_slot_empty

# What stands in for a sublayer that computes no rows: (residual, normed input, layer arguments) -> addition.
Replacement = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
# Arguments of cross-attention, which no supported structure has; an attention must not see them.
_NOT_FOR_ATTENTION = ("encoder_hidden_states", "encoder_attention_mask", "hidden_states")


@dataclass
class SublayerPlan:
    """What is decided for one sublayer.

    Attributes:
        compute: Whether any row is computed.
        replacement: Makes what is added instead where none is, given the layer, whether the model is a decoder,
            and the cache slot of the layer's attention.
        weights: What the replacement reads, put on the layer as buffers that its `state_dict` leaves out.
    """

    compute: bool = True
    replacement: Callable[[nn.Module, bool, int], Replacement] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class TokenPolicy(Protocol):
    """A method that decides which rows sublayers compute."""

    def sublayer_plans(self, anatomy: Anatomy) -> dict[tuple[int, Kind], SublayerPlan]:
        """The decision for every sublayer it touches, keyed by (layer, kind).

        Raises:
            PlanError: If the method names what the model does not have.
        """
        ...


@dataclass
class LayerExecutor:
    """Runs one layer according to the plans of its two sublayers.

    Attributes:
        layer: The layer, whose parts are looked up anew in every call.
        structure: The row of the structure table that says what the parts are.
        sublayers: The plan of each sublayer.
        replacements: What stands in for sublayers that compute nothing.
        slot: The cache slot of the layer's attention, where it does not run and its replacement keeps no state there.
    """

    layer: nn.Module
    structure: Structure
    sublayers: dict[Kind, SublayerPlan] = field(
        default_factory=lambda: {kind: SublayerPlan() for kind in KINDS}
    )
    replacements: dict[Kind, Replacement] = field(default_factory=dict)
    slot: int | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.names = positional_names(self.layer)[1:]
        self.parallel = self.structure.is_parallel(self.layer)
        # MPNet's encoder indexes the layer's output; every other stack takes the tensor.
        self.returns_tuple = "output_attentions" in self.names

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the layer's `forward`, with the same arguments and the same kind of result."""
        kwargs.update(zip(self.names[: len(args)], args, strict=True))
        attention, weights = self.addition("attention", hidden_states, kwargs)
        if self.parallel:
            mlp, _ = self.addition("mlp", hidden_states, kwargs)
            additions = [a for a in (mlp, attention) if a is not None]
            output = sum(additions[1:], additions[0]) + hidden_states if additions else hidden_states
        else:
            hidden_states = self.residual("attention", hidden_states, attention)
            mlp, _ = self.addition("mlp", hidden_states, kwargs)
            output = self.residual("mlp", hidden_states, mlp)
        if not self.returns_tuple:
            return output
        return (output, weights) if kwargs.get("output_attentions") else (output,)

    def addition(self, kind: Kind, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        """What the sublayer adds to the residual `x` `[batch, tokens, hidden]`, and attention weights if any.

        For a post-norm sublayer whose module contains the norm, the first is the new residual itself.
        """
        parts, plan, layer = self.structure.parts(kind), self.sublayers[kind], self.layer
        if not plan.compute:
            replacement = self.replacements.get(kind)
            if kind == "attention" and self.slot is not None:
                leave_slot_empty(layer_cache(kwargs), self.slot)
            return (None if replacement is None else replacement(x, self.normed(kind, x), kwargs)), None
        module, h, weights = getattr(layer, parts.module), self.normed(kind, x), None
        if kind == "attention":
            given = {k: v for k, v in kwargs.items() if k not in _NOT_FOR_ATTENTION}
            output = module(h, **given)
            y, weights = (
                (output[0], output[1] if len(output) > 1 else None)
                if isinstance(output, tuple)
                else (output, None)
            )
        else:
            y = module(h)
            y = y[0] if isinstance(y, tuple) else y
        if parts.projection is not None:
            y = getattr(layer, parts.projection)(y, x)
        if parts.norm_after is not None:
            y = getattr(layer, parts.norm_after)(y)
        if parts.dropout is not None:
            y = getattr(layer, parts.dropout)(y)
        return y, weights

    def normed(self, kind: Kind, x: Tensor) -> Tensor:
        """The sublayer's input: the residual behind the norm in front of it, if there is one."""
        norm = self.structure.parts(kind).norm_before
        return x if norm is None else getattr(self.layer, norm)(x)

    def difference(self, kind: Kind, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Residual after the sublayer minus residual `x` before it `[batch, tokens, hidden]`."""
        y, _ = self.addition(kind, x, kwargs)
        if y is None:
            return torch.zeros_like(x)
        return self.residual(kind, x, y) - x if self.structure.parts(kind).post_norm else y

    def residual(self, kind: Kind, x: Tensor, y: Tensor | None) -> Tensor:
        """The residual after the sublayer."""
        parts = self.structure.parts(kind)
        if y is None:
            return x
        if not self.sublayers[kind].compute:
            return x + y
        if parts.whole or parts.projection is not None:
            return y
        if parts.outer_norm is not None:
            return getattr(self.layer, parts.outer_norm)(y + x)
        return x + y

"""A sublayer by the layer's own modules, on all tokens of the batch, in the shapes that they are made for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from slimformer.attention import for_attention
from slimformer.structures import Kind, Structure, first_of


def whole_sublayer(
    layer: nn.Module,
    structure: Structure,
    kind: Kind,
    x: Tensor,
    kwargs: dict[str, Any],
    normed: Callable[[Kind, Tensor], Tensor],
) -> tuple[Tensor, Tensor | None]:
    """What a sublayer adds to the residual, and attention weights if there are any.

    For a post-norm sublayer whose module contains the norm, the first is the new residual itself.

    Args:
        layer: The layer.
        structure: Says what its parts are.
        kind: Which sublayer.
        x: The residual `[batch, tokens, hidden]`.
        kwargs: The layer's arguments.
        normed: Gives the sublayer's input, the residual behind the norm in front of it.
    """
    parts, weights = structure.parts(kind), None
    h = normed(kind, x)
    if kind == "mlp":
        y = parts.by_token(layer, h)
    else:
        module = parts.of(layer)
        output = module(h, **for_attention(kwargs, module))
        y = first_of(output)
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
    if parts.projection is not None:
        y = getattr(layer, parts.projection)(y, x)
    if parts.norm_after is not None:
        y = getattr(layer, parts.norm_after)(y)
    if parts.dropout is not None:
        y = getattr(layer, parts.dropout)(y)
    return parts.scaled(layer, y), weights


def residual_after(layer: nn.Module, structure: Structure, kind: Kind, x: Tensor, y: Tensor) -> Tensor:
    """The residual `[batch, tokens, hidden]` after a sublayer that gave `y`."""
    parts = structure.parts(kind)
    if parts.whole or parts.projection is not None:
        return y
    if parts.outer_norm is not None:
        after: Tensor = getattr(layer, parts.outer_norm)(y + x)
        return after
    return x + y

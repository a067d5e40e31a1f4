"""A model's rotary embedding: where it is, how it turns queries and keys, and what transforms need to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slimformer.anatomy import Anatomy
from slimformer.errors import UnsupportedModelError

if TYPE_CHECKING:
    from slimformer.attention_transforms import Attentions


@dataclass(frozen=True)
class Rotary:
    """The rotary embedding of the layers of one type.

    Attributes:
        module: The embedding, which makes cosines and sines for all layers.
        layer_type: The type by which it is asked, where types differ; None where they do not.
        interleaved: Whether rotation pairs neighbouring channels, rather than the two halves.
    """

    module: nn.Module
    layer_type: str | None
    interleaved: bool

    @property
    def name(self) -> str:
        """The attribute of the module with the angles per position."""
        return "inv_freq" if self.layer_type is None else f"{self.layer_type}_inv_freq"

    @property
    def inv_freq(self) -> Tensor:
        """The angle by which each pair of channels turns per position, float32 `[rotary_dim / 2]`."""
        found: Tensor = getattr(self.module, self.name)
        return found.float()


def find_rotary(attentions: Attentions, owner: str) -> dict[int, Rotary]:
    """The rotary embedding of every layer that sees all of a text and turns its queries and keys.

    Args:
        attentions: The model's.
        owner: The method that asks, for messages.

    Raises:
        UnsupportedModelError: If there is none, or it turns in a way that is not known.
    """
    anatomy = attentions.anatomy
    module = getattr(anatomy.stack, "rotary_emb", None)
    name = type(anatomy.stack).__name__
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(
            f"{owner} needs rotary positions, and {name} has no rotary_emb. For models with a table of positions "
            "there are PositionInterpolation, GroupedPositions and RecurrentPositions in "
            "slimformer.methods.absolute_positions."
        )
    if "mrope_section" in str(getattr(anatomy.stack.config, "rope_parameters", "")):
        raise UnsupportedModelError(
            f"{owner} does not know the positions of images: {name} turns channels by several positions at once."
        )
    if attentions.call is None:
        raise UnsupportedModelError(
            f"{owner} checks how {name} turns queries and keys on eight tokens, and its weights are not in memory. "
            "Load the model without offloading."
        )
    known: dict[str | None, Rotary] = {}
    found: dict[int, Rotary] = {}
    for index in attentions.full_layers(owner):
        layer_type = anatomy.layer_types[index]
        own = layer_type if hasattr(module, f"{layer_type}_inv_freq") else None
        if own not in known:
            known[own] = _examined(anatomy, module, own, attentions.call[0], owner)
        if attentions.heeds_positions(index):
            found[index] = known[own]
    if not found:
        raise UnsupportedModelError(
            f"{owner} changes nothing in {name}: none of its layers turns queries and keys."
        )
    return found


def rotary_call(
    module: Any, x: Tensor, position_ids: Tensor, layer_type: str | None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[1 or batch, tokens, rotary_dim]` from a rotary embedding."""
    cos, sin = module(x, position_ids) if layer_type is None else module(x, position_ids, layer_type)
    return cos, sin


def rope_type(module: nn.Module, layer_type: str | None) -> str:
    """The kind of scaling that a rotary embedding has by its config."""
    kind: Any = getattr(module, "rope_type", "default")
    return str(kind.get(layer_type, "default") if isinstance(kind, dict) else kind)


def _examined(anatomy: Anatomy, module: nn.Module, layer_type: str | None, x: Tensor, owner: str) -> Rotary:
    """How the embedding lays out its angles, checked on eight positions."""
    positions = torch.arange(8, device=x.device)[None]
    with torch.no_grad():
        cos, _ = rotary_call(module, x.float(), positions, layer_type)
    halves = torch.equal(*cos.chunk(2, dim=-1))
    rotary = Rotary(module, layer_type, interleaved=not halves)
    each = cos.chunk(2, dim=-1)[0] if halves else cos[..., ::2]
    scaling = getattr(
        module, "attention_scaling" if layer_type is None else f"{layer_type}_attention_scaling", 1.0
    )
    angles = positions[0, :, None].to(torch.float32) * rotary.inv_freq.to(x.device)
    if each.shape[-1] != angles.shape[-1] or not torch.allclose(each[0], angles.cos() * scaling, atol=1e-3):
        raise UnsupportedModelError(
            f"{owner} does not know how {type(module).__name__} of {type(anatomy.stack).__name__} turns queries and "
            "keys: its cosines are not those of position times inv_freq."
        )
    return rotary

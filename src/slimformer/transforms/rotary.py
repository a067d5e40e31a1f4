"""A model's rotary embedding: where it is, how it turns queries and keys, and what transforms need to know of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimformer.errors import UnsupportedModelError
from slimformer.model.anatomy import Anatomy
from slimformer_kernels.rotary import rotary_reference

if TYPE_CHECKING:
    from slimformer.transforms.transform import Attentions

# Angles of these kinds depend on the length of a text, so that no key can be turned by what `inv_freq` says.
_CHANGING = ("dynamic", "longrope")


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


def find_rotary(attentions: Attentions, owner: str, turns: bool = True) -> dict[int, Rotary]:
    """The rotary embedding of every layer that sees all of a text and turns its queries and keys.

    Args:
        attentions: The model's.
        owner: The method that asks, for messages.
        turns: Whether it will turn queries or keys further, by what this says about their channels.

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
        if not attentions.heeds_positions(index):
            continue
        rotary = known[own]
        if turns and rope_type(module, own) not in _CHANGING:
            rotary = replace(rotary, interleaved=_pairs_neighbours(attentions, index, rotary, owner))
        found[index] = rotary
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
    # Under a device map the embedding may be elsewhere than the first layer.
    angles = positions[0, :, None].to(cos.device, torch.float32) * rotary.inv_freq.to(cos.device)
    if each.shape[-1] != angles.shape[-1] or not torch.allclose(each[0], angles.cos() * scaling, atol=1e-3):
        raise UnsupportedModelError(
            f"{owner} does not know how {type(module).__name__} of {type(anatomy.stack).__name__} turns queries and "
            "keys: its cosines are not those of position times inv_freq."
        )
    return rotary


def _pairs_neighbours(attentions: Attentions, index: int, rotary: Rotary, owner: str) -> bool:
    """Whether a layer turns neighbouring channels together, rather than the two halves.

    How cosines are laid out does not tell: some models lay them out in halves and turn neighbours. So eight tokens run
    at two places, and queries and keys at the first, turned further, must be those at the second.
    """
    call = attentions.call
    core = attentions.core(index)
    name = f"{type(core).__name__} of layer {index}"
    device = next(core.parameters()).device
    near = torch.arange(8, device=device)[None]
    far = 13 * near + 101
    # A copy, since some embeddings remember the longest text.
    module, found = copy.deepcopy(rotary.module).to(device), []
    for position_ids in (near, far):
        like = torch.zeros(1, 8, 1, device=device) if call is None else call[0].to(device)
        with torch.no_grad():
            angles = rotary_call(module, like, position_ids, rotary.layer_type)
        found.append(attentions.queries_and_keys(index, angles, position_ids))
    if found[0] is None or found[1] is None:
        raise UnsupportedModelError(
            f"{owner} must know what {name} attends with, and it calls none of transformers' attention functions."
        )
    inv_freq = rotary.inv_freq.to(device)
    angle = ((far * inv_freq[:, None]).double() - (near * inv_freq[:, None]).double()).T
    for interleaved in (False, True):
        layout = angle.repeat_interleave(2, 1) if interleaved else torch.cat((angle, angle), 1)
        cos, sin = layout.cos().float(), layout.sin().float()
        if all(
            _alike(rotary_reference(at_near.float(), cos, sin, None, interleaved), at_far)
            for at_near, at_far in zip(found[0], found[1], strict=True)
        ):
            return interleaved
    raise UnsupportedModelError(
        f"{owner} turns queries and keys further than the model does, and those of {name} are not turned in their "
        "first channels alone, by halves or by neighbours, as the last thing that is done to them: there may be a norm "
        "behind the rotation, or channels without positions in front."
    )


def _alike(turned: Tensor, expected: Tensor) -> bool:
    """Whether queries or keys `[tokens, heads, head_dim]` point the same way, up to rounding in their dtype.

    Their length may depend on the position: turning does not change it.
    """
    if turned.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    directions = (F.normalize(x.double(), dim=-1) for x in (turned, expected))
    first, second = directions
    return bool((first - second).norm(dim=-1).max() <= tolerance)

"""A rotary embedding that turns long texts by other angles, chosen by each text's own length."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from slimformer.cache.room import RoomLayer
from slimformer.calls.texts import Texts, current_texts
from slimformer.errors import PlanError
from slimformer.transforms.rotary import Rotary, rotary_call
from slimformer_kernels.rotary import rotary_reference


@dataclass
class Angles:
    """By how much each pair of channels turns per position.

    Attributes:
        inv_freq: float32 `[rotary_dim / 2]`.
        scaling: A factor on cosines and sines.
    """

    inv_freq: Tensor
    scaling: float


@dataclass
class ScaledRotary:
    """Stands in for the `forward` of a rotary embedding.

    Attributes:
        rotary: The embedding of the layers that are scaled.
        angles: Those of texts in each bucket of lengths, the model's own first: a text of up to L0 tokens is in the
            first, one of up to `L0 * 2 ** k` in number k, and in the last whatever is longer.
        trained: L0.
        capacity: The longest text.
        remedy: Says what to do about a text of so many tokens.
        cores: The attention modules that are scaled, whose slots in a cache may need turning.
        had: The embedding's own `forward`.
    """

    rotary: Rotary
    angles: Sequence[Angles]
    trained: int
    capacity: float
    remedy: Callable[[int], str]
    cores: Sequence[nn.Module]
    had: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.scaled = [_with_angles(self.rotary, angles) for angles in self.angles[1:]]
        self.bounds = [self.trained * 2**number for number in range(len(self.angles) - 1)]
        # By device: a graph cannot be captured in which they come from the host.
        self._bounds_on: dict[torch.device, Tensor] = {}

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[1 or batch, tokens, rotary_dim]`.

        Args:
            x: The residual `[batch, tokens, hidden]`, for its dtype and device.
            position_ids: `[1 or batch, tokens]`.
            layer_type: For which layers, where the model asks by type.

        Raises:
            DataError: If a text is longer than the method reaches.
            PlanError: If a text outgrows a bucket in a cache whose keys cannot be turned.
        """
        own: tuple[Tensor, Tensor] = rotary_call(self.had, x, position_ids, layer_type)
        if layer_type != self.rotary.layer_type:
            return own
        texts = current_texts(x.shape[0], x.shape[1], x.device)
        if not texts.check_longer_than(self.trained, self.capacity, self.remedy):
            return own
        bucket = self._bucket(texts.lengths)
        self._turn_cache(texts, bucket, position_ids)
        cos, sin = own
        for number, module in enumerate(self.scaled, start=1):
            if number > 1 and self.trained * 2 ** (number - 1) >= texts.longest:
                break
            here = (bucket == number)[:, None, None]
            other = rotary_call(module, x, position_ids, layer_type)
            cos, sin = torch.where(here, other[0], cos), torch.where(here, other[1], sin)
        return cos, sin

    def _bucket(self, lengths: Tensor) -> Tensor:
        """The bucket of each length, int64 `[batch]`."""
        if lengths.device not in self._bounds_on:
            self._bounds_on[lengths.device] = torch.tensor(self.bounds, device=lengths.device)
        return torch.bucketize(lengths, self._bounds_on[lengths.device])

    def _turn_cache(self, texts: Texts, bucket: Tensor, position_ids: Tensor) -> None:
        """Turn the keys of texts that have just outgrown the bucket in which their keys were cached."""
        if not texts.past or texts.cache is None:
            return
        before = self._bucket(texts.lengths_before())
        if not bool((bucket != before).logical_and(texts.lengths_before() > 0).any()):
            return
        device = bucket.device
        inv_freq = torch.stack([angles.inv_freq.to(device) for angles in self.angles])
        scaling = torch.tensor([angles.scaling for angles in self.angles], device=device)
        # Keys stand at consecutive positions that end with those of this call.
        index = torch.arange(texts.past, device=device) + position_ids[:, -1:] - (texts.longest - 1)
        angle = index.expand(texts.batch, -1)[..., None] * (inv_freq[bucket] - inv_freq[before])[:, None]
        layout = angle.repeat_interleave(2, -1) if self.rotary.interleaved else torch.cat((angle, angle), -1)
        factor = (scaling[bucket] / scaling[before])[:, None, None]
        cos, sin = (layout.cos() * factor).flatten(0, 1), (layout.sin() * factor).flatten(0, 1)
        for core in self.cores:
            _turn_slot(
                texts.cache, int(getattr(core, "layer_idx", 0)), texts.past, cos, sin, self.rotary.interleaved
            )


def _with_angles(rotary: Rotary, angles: Angles) -> nn.Module:
    """A copy of a rotary embedding that turns by other angles."""
    module: Any = copy.deepcopy(rotary.module)
    setattr(module, rotary.name, angles.inv_freq)
    prefix = "" if rotary.layer_type is None else f"{rotary.layer_type}_"
    setattr(module, f"{prefix}attention_scaling", angles.scaling)
    found: nn.Module = module
    return found


def _turn_slot(cache: Cache, slot: int, past: int, cos: Tensor, sin: Tensor, interleaved: bool) -> None:
    if slot >= len(cache.layers):
        return
    layer = cache.layers[slot]
    keys = getattr(layer, "keys", None)
    if keys is None:
        return
    if type(layer) not in (DynamicLayer, StaticLayer, RoomLayer):
        raise PlanError(
            f"A text has outgrown the length that its cached keys were turned for, and those in a "
            f"{type(layer).__name__} cannot be turned again. Use a DynamicCache or StaticCache without elimination, "
            "or begin with a text that is longer than the trained length."
        )
    rows = keys[:, :, :past].transpose(1, 2).flatten(0, 1)
    turned = rotary_reference(rows, cos.to(keys.device), sin.to(keys.device), None, interleaved)
    # In place: compiled steps rely on the address of a static cache.
    keys[:, :, :past].copy_(turned.view(keys.shape[0], past, *turned.shape[1:]).transpose(1, 2))

"""The slots of layers that tokens have left, while steps are replayed: those that stayed lie in the room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from slimformer.cache.room import Places, RoomCache, RoomLayer
from slimformer.rows.shorter_cache import ShorterLayer


class StayedLayer(RoomLayer):
    """One of them. Whatever is no replayed step gets a `ShorterLayer` back, which knows more.

    Attributes:
        starts: The first place of every text's keys, on the device `[batch]`.
        before: What it was made of.
    """

    starts: Tensor
    before: ShorterLayer

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self.starts.copy_(self.starts.index_select(0, beam_idx.to(self.starts.device)))

    def shorter(self) -> ShorterLayer:
        """The same tokens, as layers outside of steps have them."""
        found, whole = ShorterLayer(), self.before
        found.__dict__.update(whole.__dict__)
        keys, values = self.keys, self.values
        if keys is None or values is None:
            return found
        found.keys, found.values = keys.clone(), values.clone()
        found.valid = torch.arange(self.length, device=keys.device) >= self.starts[:, None]
        found.last = whole.last + self.length - whole.get_seq_length()
        return found


def starts_of(layer: ShorterLayer) -> Tensor | None:
    """Where every text begins, on the host `[batch]`; None where there are gaps behind that."""
    keys, valid = layer.keys, layer.valid
    if keys is None or valid is None:
        return None
    seen = valid.cpu()
    first = (~seen).sum(1)
    return first if bool((seen == (torch.arange(seen.shape[1]) >= first[:, None])).all()) else None


def settled(
    cache: RoomCache, index: int, takes: Callable[[int, Tensor], Places], starts: Tensor
) -> StayedLayer:
    """Put a shorter slot into the room, with `starts` on the device holding where its texts begin."""
    before: Any = cache.layers[index]
    layer = StayedLayer(takes, index, sliding=False)
    layer.update(before.keys, before.values)
    layer.starts, layer.before = starts, before
    cache.layers[index] = layer
    return layer


def released(cache: RoomCache) -> None:
    """Give every layer the slot back that it knows outside of steps."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, StayedLayer):
            cache.layers[index] = layer.shorter()

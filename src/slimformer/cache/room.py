"""A key-value cache with room: keys are written where they will stay, so that steps may be replayed from CUDA graphs.

Outside of steps it is a dynamic cache: it holds as many keys as have come, and hands out views of those.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from slimformer.cache.filter_state import FilterState
from slimformer.cache.steps import current_step

# A cache that makes room for less would soon have to move.
_LEAST = 256


def room_for(tokens: int) -> int:
    """The number of places that a cache for so many tokens has: a power of two, or one and a half of one.

    Example:
        >>> [room_for(tokens) for tokens in (10, 256, 257, 700, 1600)]
        [256, 256, 384, 768, 2048]
    """
    size = max(_LEAST, 1 << max(tokens - 1, 0).bit_length())
    return size * 3 // 4 if size > _LEAST and tokens <= size * 3 // 4 else size


class Places:
    """The memory of one slot: keys and values `[batch, kv_heads, places, head_dim]`, made when the first arrive."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def fitting(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The memory, for keys and values like these."""
        if self.keys is None or self.values is None:
            # Zeros, since whoever reads a whole room multiplies what lies behind the keys by zero.
            self.keys, self.values = (
                t.new_zeros(*t.shape[:2], self.count, t.shape[3]) for t in (keys, values)
            )
        return self.keys, self.values

    def fits(self, keys: Tensor) -> bool:
        """Whether keys like these may lie here."""
        own = self.keys
        if own is None:
            return True
        return (own.shape[:2], own.shape[3], own.dtype, own.device) == (
            keys.shape[:2],
            keys.shape[3],
            keys.dtype,
            keys.device,
        )


class RoomLayer(DynamicLayer):
    """One slot of a `RoomCache`.

    Attributes:
        places: Where its keys and values lie; None before the first.
        length: How many tokens it holds.
    """

    is_compileable = False

    def __init__(self, takes: Callable[[int, Tensor], Places], index: int, sliding: bool) -> None:
        self.places: Places | None = None
        self.length = 0
        super().__init__()
        # Not the cache, which would keep itself alive.
        self.takes, self.index, self.is_sliding = takes, index, sliding

    # Views, so that a step need not make one for every slot.
    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Of all tokens `[batch, kv_heads, tokens, head_dim]`."""
        whole = None if self.places is None else self.places.keys
        return None if whole is None else whole[:, :, : self.length]

    @keys.setter
    def keys(self, value: Tensor | None) -> None:
        self._replace(value, None)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Likewise."""
        whole = None if self.places is None else self.places.values
        return None if whole is None else whole[:, :, : self.length]

    @values.setter
    def values(self, value: Tensor | None) -> None:
        self._replace(None, value)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take a place in the cache's room."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.places = self.takes(self.index, key_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep keys and values `[batch, kv_heads, tokens, head_dim]`; returns all, or in a step the whole room."""
        if not self.is_initialized or self.places is None:
            self.lazy_initialization(key_states, value_states)
        places: Any = self.places
        step = current_step()
        if step is not None:
            keys, values = places.fitting(key_states, value_states)
            place = step.place_in(self.index)
            keys.index_copy_(2, place, key_states)
            values.index_copy_(2, place, value_states)
            return keys, values
        before, self.length = self.length, self.length + key_states.shape[2]
        if self.length > places.count:
            places = self._moved(Places(room_for(self.length)), before)
        keys, values = places.fitting(key_states, value_states)
        keys[:, :, before : self.length] = key_states
        values[:, :, before : self.length] = value_states
        if before == 0:
            # A prompt's own, without the strides of the room.
            return key_states, value_states
        return keys[:, :, : self.length], values[:, :, : self.length]

    @property
    def whole(self) -> tuple[Tensor, Tensor] | None:
        """All of the room `[batch, kv_heads, places, head_dim]`; None before the first tokens."""
        places = self.places
        if places is None or places.keys is None or places.values is None:
            return None
        return places.keys, places.values

    def get_seq_length(self) -> Any:
        """How many tokens it holds; in a step that is read on the device."""
        step = current_step()
        return self.length if step is None else step.first[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask: nothing leaves, not from sliding windows either."""
        if current_step() is not None and self.places is not None:
            return self.places.count, 0
        return self.length + query_length, 0

    def dynamic(self) -> DynamicLayer:
        """The same keys and values in a slot of their own."""
        found = DynamicLayer()
        if self.keys is not None and self.values is not None:
            found.update(self.keys.clone(), self.values.clone())
        return found

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens; a positive number is the length to keep, as it was before transformers 5.18."""
        wanted = int(tokens_to_remove)
        self.length = max(self.length + wanted, 0) if wanted <= 0 else min(self.length, wanted)

    def reset(self) -> None:
        """Forget all."""
        self.length, self.is_initialized, self.places = 0, False, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams, where the keys lie."""
        for held in (self.keys, self.values):
            if held is not None:
                held.copy_(held.index_select(0, beam_idx.to(held.device)))

    def moved_to(self, places: Places) -> None:
        """Go on elsewhere."""
        self._moved(places, self.length)

    def _moved(self, places: Places, length: int) -> Places:
        old, self.places = self.places, places
        if old is not None and old.keys is not None and old.values is not None:
            keys, values = places.fitting(old.keys, old.values)
            keys[:, :, :length] = old.keys[:, :, :length]
            values[:, :, :length] = old.values[:, :, :length]
        return places

    def _replace(self, keys: Tensor | None, values: Tensor | None) -> None:
        """Hold other tensors than were put here, as caches do that select or repeat texts."""
        given = keys if values is None else values
        if given is None or self.places is None:
            return
        fresh = Places(given.shape[2])
        fresh.keys = keys if keys is not None else self.places.keys
        fresh.values = values if values is not None else self.places.values
        self.places, self.length = fresh, given.shape[2]


class RoomCache(DynamicCache):
    """A cache whose slots share the length of their room.

    Args:
        config: The decoder's.
        takes: The memory for a slot, given its index and its first keys.
        lease: What stands behind that.

    Attributes:
        borrowed: Whether it is another's that holds the room, and this one only goes on from it.
    """

    borrowed = False

    def __init__(self, config: Any, takes: Callable[[int, Tensor], Places], lease: Any = None) -> None:
        super().__init__(config=config)
        self.config, self.lease = config, lease
        slots: list[Any] = vars(self)["layers"]
        self.layers = [RoomLayer(takes, index, bool(slot.is_sliding)) for index, slot in enumerate(slots)]

    def over_the_same(self) -> RoomCache:
        """A cache for steps in the same places, which keeps none of what may follow alive."""
        found = RoomCache(self.config, _takes_no_more)
        for index, layer in enumerate(self.layers):
            own = found.layers[index]
            if isinstance(layer, RoomLayer) and isinstance(own, RoomLayer):
                own.places, own.is_initialized = layer.places, layer.is_initialized
            elif isinstance(layer, FilterState):
                # What it stands for would keep the cache alive.
                found.layers[index] = layer.over_the_same(own)
            else:
                found.layers[index] = layer
        return found

    def dynamic(self) -> DynamicCache:
        """The same keys and values in a cache of their own, which keeps nothing else alive."""
        found = DynamicCache(config=self.config)
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, RoomLayer):
                found.layers[index] = copy.deepcopy(layer)
            elif layer.keys is not None and layer.values is not None:
                found.layers[index].update(layer.keys.clone(), layer.values.clone())
        return found


def _takes_no_more(index: int, keys: Tensor) -> Places:
    return Places(keys.shape[2])


def rooms_of(cache: RoomCache) -> list[RoomLayer]:
    """The slots that hold keys."""
    return [layer for layer in cache.layers if isinstance(layer, RoomLayer) and layer.places is not None]


def room_of(cache: Cache | None, slot: int) -> tuple[Tensor, Tensor] | None:
    """All of the room of a slot; None where there is none."""
    layer = None if cache is None or slot >= len(cache.layers) else cache.layers[slot]
    return layer.whole if isinstance(layer, RoomLayer) else None


def newest(cache: RoomCache) -> int:
    """How many tokens a cache holds."""
    return max((layer.length for layer in rooms_of(cache)), default=0)


def newest_keys(cache: RoomCache, since: int) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of every slot from one place on: where they lie, and a copy."""
    held = [t for layer in rooms_of(cache) for t in (layer.keys, layer.values) if t is not None]
    return [(t[:, :, since:], t[:, :, since:].clone()) for t in held]


def filled(cache: RoomCache, tokens: int) -> None:
    """Say that a step has put tokens into every slot."""
    for layer in cache.layers:
        if isinstance(layer, RoomLayer) and layer.places is not None:
            layer.length += tokens
        elif isinstance(layer, FilterState) and layer.state is not None:
            layer.seen += tokens

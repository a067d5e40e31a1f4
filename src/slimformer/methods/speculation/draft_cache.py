"""The cache that a draft reads: the model's own keys where its layers are among the model's, else one of its own."""

from __future__ import annotations

import copy
from typing import Any

from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from slimformer.cache.filter_state import FilterState
from slimformer.cache.layout import CacheLayout, stamp
from slimformer.cache.room import RoomCache, RoomLayer

# Whose `update` leaves what was there as it was.
_REPLACING = (DynamicLayer, DynamicSlidingWindowLayer, FilterState, RoomLayer)


def can_borrow(draft: CacheLayout, model: CacheLayout) -> bool:
    """Whether a draft may read the model's cache: every slot that it reads holds what the model keeps there."""
    pairs = zip(draft.contents, model.contents, strict=True)
    return draft.angles == model.angles and all(own in ("nothing", there) for own, there in pairs)


def grows_by_replacing(cache: Any) -> bool:
    """Whether nothing that is put into a copy of a cache shows in the cache."""
    return (
        isinstance(cache, Cache)
        and not getattr(cache, "offloading", False)
        and all(type(layer) in _REPLACING for layer in cache.layers)
    )


def borrowed(cache: Cache, model: CacheLayout, draft: CacheLayout) -> Cache:
    """A cache for a draft that begins with what the model's holds; tokens put there stay there.

    Args:
        cache: The model's.
        model: Where its layers keep what.
        draft: Where those of the draft do.

    Returns:
        Another cache over the same tensors.
    """
    found = copy.copy(cache)
    found.layers = list(cache.layers)
    if isinstance(found, RoomCache):
        # What a draft writes there lies behind what the model has read, which writes over it.
        found.borrowed = True
    for own, there in zip(draft.slots, model.slots, strict=True):
        if there < len(cache.layers) and own < len(found.layers):
            found.layers[own] = _copied(cache.layers[there])
    stamp(found, draft)
    return found


def _copied(layer: Any) -> Any:
    own = copy.copy(layer)
    if isinstance(own, DynamicSlidingWindowLayer):
        # Nothing is taken back from a draft's cache, so that it keeps no more than its window.
        own.record_past = False
        # Before transformers 5.18 a tensor after a crop, which would be counted up in place, for the model too.
        own.cumulative_length = int(own.cumulative_length)
        if own.keys is not None and own.cumulative_length >= own.sliding_window:
            own.keys, own.values = (t[:, :, -own.sliding_window + 1 :] for t in (own.keys, own.values))
    return own

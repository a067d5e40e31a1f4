"""Which slot of a key-value cache belongs to which layer, when some attentions no longer run, and what it says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    EncoderDecoderCache,
)

from slimformer.errors import PlanError

# What layers, attentions and stacks call the cache: from 5.24 of transformers on, before it, in GPT-NeoX, and before
# 5.24 in linear attentions.
CACHE_NAMES = ("cache", "past_key_values", "layer_past", "cache_params")
# What one layer's slot holds: keys and values of all tokens or of those that stay, the last inputs of a filter with so
# many taps, nothing, or how many tokens have passed.
Content = Literal["keys", "keys that stay", "nothing", "count"] | int


def compact_slots(layer_types: Sequence[str], dropped: Sequence[int]) -> list[int]:
    """Assign every layer a cache slot so that surviving attentions fill the first slots of their own type.

    `Cache.get_seq_length()` and the mask builders read the first slot of each type, so those slots must belong to
    attentions that still run; and a slot's type (sliding or full) is fixed by the config, so layers only move
    among slots of their own type. Dropped attentions get the slots left over.

    Args:
        layer_types: The cache type of every layer.
        dropped: Indices of layers whose attention does not run.

    Returns:
        The slot of every layer.

    Raises:
        PlanError: If nothing that survives can fill the slot from which positions are counted.

    Example:
        >>> compact_slots(["full"] * 4, dropped=[0, 2])
        [2, 0, 3, 1]
        >>> compact_slots(["sliding", "full", "sliding", "full"], dropped=[0])
        [2, 1, 0, 3]
    """
    gone = set(dropped)
    slots = list(range(len(layer_types)))
    for kind in dict.fromkeys(layer_types):
        own = [i for i, t in enumerate(layer_types) if t == kind]
        order = [i for i in own if i not in gone] + [i for i in own if i in gone]
        for layer, slot in zip(order, own, strict=True):
            slots[layer] = slot
    counted = counting_slot(layer_types)
    if gone and slots.index(counted) in gone:
        kind = layer_types[counted]
        raise PlanError(
            f"The plan drops every attention of type {kind!r} (layers "
            f"{[i for i, t in enumerate(layer_types) if t == kind]}), and positions are counted in "
            "the cache of the first of them. Keep at least one attention of this type."
        )
    return slots


def counting_slot(layer_types: Sequence[str]) -> int:
    """The slot from which a cache reads how many tokens it holds: the first that is no linear attention's.

    Example:
        >>> counting_slot(["linear_attention", "full_attention"])
        1
    """
    for slot, kind in enumerate(layer_types):
        held = DYNAMIC_LAYER_TYPE_MAPPING.get(kind)
        if held is None or issubclass(held, CacheLayerMixin):
            return slot
    return 0


def knows_tokens(cache: Cache, slot: int) -> bool:
    """Whether a slot says how many tokens it holds, which linear attentions' slots don't."""
    return slot >= len(cache.layers) or isinstance(cache.layers[slot], CacheLayerMixin)


def extended(cache: Cache, slot: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Put new keys and values `[batch, kv_heads, tokens, head_dim]` into a slot; returns all that it holds.

    The first tokens of an empty slot are kept as they are: appending them to nothing would copy the whole prompt.
    """
    layer: Any = cache.layers[slot] if slot < len(cache.layers) else None
    empty = type(layer) is DynamicLayer and not (layer.is_initialized or cache.offloading)
    if empty and not torch.compiler.is_compiling() and _alone(keys) and _alone(values):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        return keys, values
    held: tuple[Tensor, Tensor] = cache.update(keys, values, slot)
    return held


def _alone(x: Tensor) -> bool:
    """Whether a tensor is all that its memory holds, so that keeping it keeps nothing else alive."""
    return x.untyped_storage().nbytes() == x.numel() * x.element_size()


def layer_cache(kwargs: Mapping[str, Any]) -> Cache | None:
    """The cache among the arguments of a layer or a stack, whose names `check_cache_arguments` has accounted for."""
    for name in CACHE_NAMES:
        found = kwargs.get(name)
        if isinstance(found, EncoderDecoderCache):
            # Decoders that may attend to an encoder make one for themselves alone too.
            return found.self_attention_cache
        if isinstance(found, Cache):
            return found
    return None


def has_foreign_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether the cache is of a kind of its own, as continuous batching's is: only the model's code knows it."""
    for name in CACHE_NAMES:
        found = kwargs.get(name)
        if found is not None and not isinstance(found, Cache):
            return True
    return False

"""Key-value cache slots and filter state when some attentions no longer run."""

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
# Inputs kept beyond what a filter reads, so that speculative decoding can take back what it guessed.
_SPARE_INPUTS = 64


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


class FilterState(CacheLayerMixin):
    """The last inputs of a causal filter, kept in the cache slot of the attention that the filter replaces.

    Living inside the cache makes it follow beam reordering, batch selection, cropping and reuse between calls
    without any code that knows about filters.

    Attributes:
        state: The last inputs `[batch, kept, hidden]`, zero before the first token and at padding: `taps - 1` of
            them, and in a cache that may be cropped some more, so that a crop can step back.
        seen: How many tokens have passed; a tensor where the cache is static.
        in_use: Whether a patched model has run with it since it was made or reset.
    """

    # What initialises slots early knows the shape of keys only.
    supports_early_init = False

    def __init__(self, replaced: CacheLayerMixin, taps: int):
        super().__init__()
        self.is_sliding = getattr(replaced, "is_sliding", False)
        self.is_compileable = bool(getattr(replaced, "is_compileable", False))
        self.is_croppable = not self.is_compileable
        self.record_past = bool(getattr(replaced, "record_past", False))
        self.replaced = replaced
        self.taps = taps
        self.in_use = False
        self.state: Tensor | None = None
        self.seen: int | Tensor = torch.tensor(0) if self.is_compileable else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate zeros like `key_states` `[batch, tokens, hidden]`."""
        batch, _, hidden = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        self.state = key_states.new_zeros(batch, self.taps - 1, hidden)
        if isinstance(self.seen, Tensor):
            self.seen = self.seen.to(self.device)
            if not torch.compiler.is_compiling():
                torch._dynamo.mark_static_address(self.state)
                torch._dynamo.mark_static_address(self.seen)
        self.is_initialized = True

    def extend(self, inputs: Tensor) -> Tensor:
        """Put the remembered inputs in front of `inputs` `[batch, tokens, hidden]` and remember the newest.

        Returns:
            `[batch, taps - 1 + tokens, hidden]`.
        """
        if not self.is_initialized:
            self.lazy_initialization(inputs, inputs)
        self.prefetch()
        state = self.state
        if state is None or state.shape[0] != inputs.shape[0]:
            came = "none" if state is None else str(state.shape[0])
            raise PlanError(
                f"The cache holds filter states for a batch of {came}, and the input has a batch of "
                f"{inputs.shape[0]}. Start with a new cache."
            )
        keep = self.taps - 1
        full = torch.cat([state.to(inputs.dtype), inputs], dim=1)
        window = full[:, state.shape[1] - keep :]
        if isinstance(self.seen, Tensor):
            # In place: compiled decode steps rely on the address staying the same.
            self.seen.add_(inputs.shape[1])
            state.copy_(full[:, full.shape[1] - keep :])
        else:
            self.seen += inputs.shape[1]
            most = full.shape[1] if self.record_past else keep + _SPARE_INPUTS
            self.state = _part(full, full.shape[1] - most, full.shape[1])
        return window

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Not an attention: nothing may be stored as keys and values here, unless the cache was reset meanwhile."""
        if not self.in_use:
            self._give_way()
            return self.update(key_states, value_states, *args, **kwargs)
        raise PlanError(
            "This cache was filled by a patched model and is now used by one patched differently. "
            "Start with a new cache."
        )

    def _give_way(self) -> None:
        """Become the slot that was replaced, for a model that runs this attention."""
        replaced: Any = self.replaced
        self.__class__ = type(replaced)
        self.__dict__ = replaced.__dict__

    def offload(self) -> None:
        """Move the inputs to the CPU."""
        if self.state is not None:
            self.state = self.state.to("cpu", non_blocking=True)

    def prefetch(self) -> None:
        """Move the inputs back to where they came from."""
        if self.state is not None and self.state.device != self.device:
            self.state = self.state.to(self.device, non_blocking=True)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask, from which filters read padding: all that has passed."""
        if isinstance(self.seen, Tensor):
            return self.replaced.get_mask_sizes(query_length)
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """How many tokens have passed; zero in a static cache, where the masks of all slots are made alike."""
        return 0 if isinstance(self.seen, Tensor) else self.seen

    def get_max_length(self) -> int:
        """The length that the replaced slot allows."""
        return self.replaced.get_max_length()

    def activate_past_recording(self) -> None:
        """Keep every input until the next crop, as sliding-window caches do for assisted generation."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Raises:
            PlanError: If more tokens are removed than were kept.
        """
        if self.state is None or isinstance(self.seen, Tensor):
            return
        length, keep = self.state.shape[1], self.taps - 1
        # Some callers pass a tensor. A positive number is the length to keep, as it was before transformers 5.18.
        wanted = int(tokens_to_remove)
        remove = -wanted if wanted <= 0 else max(int(self.seen) - wanted, 0)
        if length - remove < keep:
            raise PlanError(
                f"Cannot crop {remove} tokens: the filter of a dropped attention keeps {keep} inputs, and "
                f"{length - keep} more are left. Call `cache.activate_past_recording()` before the "
                "forward passes that may be cropped."
            )
        self.seen -= remove
        self.state = _part(self.state, length - remove - keep - _SPARE_INPUTS, length - remove)

    def reset(self) -> None:
        """Back to zeros."""
        self.in_use = False
        if isinstance(self.seen, Tensor):
            self.seen.zero_()
            if self.state is not None:
                self.state.zero_()
        else:
            self.seen, self.state, self.is_initialized = 0, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        if self.state is None:
            return
        chosen = self.state.index_select(0, beam_idx.to(self.state.device))
        if self.is_compileable:
            self.state.copy_(chosen)
        else:
            self.state = chosen

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        if self.state is not None:
            self.state = self.state[indices.to(self.state.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        if self.state is not None:
            self.state = self.state.repeat_interleave(repeats, dim=0)


def _part(x: Tensor, start: int, end: int) -> Tensor:
    """Inputs `[batch, start to end, hidden]` of `x`, copied where a view would keep much more than itself alive."""
    part = x[:, max(start, 0) : end]
    return part.clone() if x.shape[1] > 2 * part.shape[1] else part


def leave_slot_empty(cache: Cache | None, slot: int) -> None:
    """Mark the slot of an attention that does not run, so that cropping the cache passes it by.

    Static caches cannot be cropped, and writing to their list of slots would end up in compiled graphs.
    """
    if cache is None or getattr(cache, "is_compileable", False):
        return
    if slot >= len(cache.layers) and cache.layer_class_to_replicate is None:
        # Made for the first layers alone, as the draft of an early exit is: there is no slot to pass by.
        return
    if not knows_tokens(cache, slot):
        # Lengths are read from the first slot that does.
        return
    filter_state(cache, slot, taps=1)


def mark_empty_slots(cache: Cache, slots: Sequence[int]) -> None:
    """Let the slots of attentions that do not run object when another model writes there; not within a graph."""
    for slot in slots:
        if slot < len(cache.layers) and isinstance(cache.layers[slot], CacheLayerMixin):
            filter_state(cache, slot, taps=1)


def filter_state(cache: Cache | None, slot: int, taps: int) -> FilterState | None:
    """The filter state in `slot` of `cache`, put there if need be; `None` without a cache."""
    if cache is None:
        return None
    while len(cache.layers) <= slot:
        cache.layers.append((cache.layer_class_to_replicate or DynamicLayer)())
    layer = cache.layers[slot]
    if isinstance(layer, FilterState) and layer.taps != taps and not layer.in_use:
        # Left behind by another plan.
        layer = layer.replaced
    if not isinstance(layer, FilterState):
        layer = FilterState(layer, taps)
        cache.layers[slot] = layer
    if not layer.in_use:
        layer.in_use = True
    return layer


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

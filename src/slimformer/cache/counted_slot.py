"""What stands in a layer's cache slot where its token mixer does not run and layers stay in their slots: a count.

Positions and the sizes of masks are read from the first slot of the cache that knows tokens, and from the first of
every type. One number per token, in place of keys and values, keeps that right, whichever layers are dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from slimformer.cache.filter_state import FilterState
from slimformer.cache.slots import layer_cache
from slimformer.model.anatomy import named_arguments


class CountedSlot(FilterState):
    """The slot of a token mixer that does not run: it follows whatever is done to the cache, and counts.

    Attributes:
        counter: A slot of the replaced one's kind, with keys and values of one number each.
    """

    def __init__(self, replaced: CacheLayerMixin) -> None:
        super().__init__(replaced, taps=1)
        self.counter = self._new_counter()

    def _new_counter(self) -> DynamicLayer:
        """Empty; of a plain kind, since quantised or compressed slots take no single numbers."""
        if not self.is_sliding:
            return DynamicLayer()
        counter = DynamicSlidingWindowLayer(sliding_window=self.replaced.get_max_length())
        counter.record_past = self.record_past
        return counter

    def count(self, hidden: Tensor) -> None:
        """Note that the tokens of `hidden` `[batch, tokens, ...]` have passed."""
        self.in_use = self.is_initialized = True
        self.prefetch()
        ones = hidden.new_ones(hidden.shape[0], 1, hidden.shape[1], 1)
        self.counter.update(ones, ones)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the masks of this type."""
        return self.counter.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """How many tokens have passed."""
        return self.counter.get_seq_length()

    def offload(self) -> None:
        """Move the count to the CPU."""
        self.counter.offload()

    def prefetch(self) -> None:
        """Move it back."""
        self.counter.prefetch()

    def activate_past_recording(self) -> None:
        """Keep what the next crop may need."""
        self.record_past = True
        if isinstance(self.counter, DynamicSlidingWindowLayer):
            self.counter.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens."""
        self.counter.crop(tokens_to_remove)

    def reset(self) -> None:
        """As the other slots of the cache."""
        self.in_use = self.is_initialized = False
        self.counter.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        self.counter.reorder_cache(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        self.counter.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self.counter.batch_repeat_interleave(repeats)


@dataclass(frozen=True)
class Count:
    """Counts the tokens of a call in the cache that is among its arguments.

    Attributes:
        slot: That of the token mixer which does not run.
        names: The positional parameters of what was called, the residual first.
    """

    slot: int
    names: tuple[str, ...]

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """With the arguments of a module or layer."""
        given = named_arguments(self.names, args, kwargs)
        cache = layer_cache(given)
        if cache is not None:
            _count(cache, self.slot, given[self.names[0]])


def _count(cache: Cache, slot: int, hidden: Tensor) -> None:
    while len(cache.layers) <= slot:
        if cache.layer_class_to_replicate is None:
            # Made for the first layers alone, as the draft of an early exit is.
            return
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[slot]
    if not isinstance(layer, CacheLayerMixin):
        # A linear attention's: it knows no tokens.
        return
    if isinstance(layer, CountedSlot):
        layer.count(hidden)
    elif (
        isinstance(layer, LinearAttentionCacheLayerMixin)
        or hasattr(layer, "update_indexer")
        or layer.is_compileable
    ):
        # Beside states that may be in use, or where compiled graphs know the slot: keys of the shape that it may have.
        shape = (1, 1) if layer.keys is None else (layer.keys.shape[1], layer.keys.shape[-1])
        ones = hidden.new_ones(hidden.shape[0], shape[0], hidden.shape[1], shape[1])
        layer.update(ones, ones)
    else:
        counted = CountedSlot(layer.replaced if isinstance(layer, FilterState) else layer)
        cache.layers[slot] = counted
        counted.count(hidden)

"""The last inputs of a filter that stands in for an attention, kept in that attention's cache slot."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from slimformer.cache.slots import knows_tokens
from slimformer.cache.steps import current_step
from slimformer.errors import PlanError

# Inputs kept beyond what a filter reads, so that speculative decoding can take back what it guessed.
_SPARE_INPUTS = 64


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
        if current_step() is not None:
            # What replays the step counts.
            state.copy_(full[:, inputs.shape[1] :])
        elif isinstance(self.seen, Tensor):
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

    def moved_to(self, places: Tensor | None) -> Tensor | None:
        """Go on in memory that stays, for steps that are replayed.

        Args:
            places: Memory that such a state had before; used if it is like this one's.

        Returns:
            The memory; None where nothing is remembered yet.
        """
        state = self.state
        if state is None or state is places:
            return places
        shape = (state.shape[0], self.taps - 1 + _SPARE_INPUTS, state.shape[2])
        if places is None or (places.shape, places.dtype, places.device) != (
            shape,
            state.dtype,
            state.device,
        ):
            places = state.new_empty(shape)
        kept = min(state.shape[1], shape[1])
        # What was cropped is a view of the same memory.
        last = state[:, state.shape[1] - kept :].clone()
        # Zeros stand before the first token.
        places[:, : shape[1] - kept] = 0
        places[:, shape[1] - kept :] = last
        self.state = places
        return places

    def over_the_same(self, replaced: CacheLayerMixin) -> FilterState:
        """Another one in the same memory, in the place of another slot."""
        found = copy.copy(self)
        found.replaced = replaced
        return found

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

"""The cache slot of a layer that no longer computes every token: it holds those that stayed, and has its own mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from slimformer.cache.room import RoomLayer
from slimformer.calls.masks import own_key, read_mask
from slimformer.calls.stack_calls import callers_masks
from slimformer.errors import PlanError
from slimformer.rows.stream import Stream


class ShorterLayer(DynamicLayer):
    """Keys and values of the tokens that stayed, `[batch, kv_heads, kept, head_dim]`.

    Sequences that keep fewer tokens than others are filled up in front, as left padding is.

    Attributes:
        valid: Which entries are tokens, bool `[batch, kept]`.
        has_fillers: Whether some may not be, kept on the host so that no decode step waits for the device.
        last: How many of the newest entries are the newest tokens, none of which has left in any sequence.
        new: Which of the tokens that come next are text, bool `[batch, tokens]`, where the model's mask says so.
        awaits: Whether what comes next was announced by asking for its mask, as no other model does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.valid: Tensor | None = None
        self.has_fillers = False
        self.last = 0
        self.new: Tensor | None = None
        self.awaits = False

    def store(self, keys: Tensor, values: Tensor, stream: Stream) -> bool:
        """Add the keys and values `[held, kv_heads, head_dim]` of a stream's rows; returns whether it held others."""
        before, valid = self.valid, stream.slots()[1]
        past = self.get_seq_length()
        alike, last = stream.ends()
        self.has_fillers, self.last, self.new = self.has_fillers or not alike, last, None
        super().update(stream.filled_up(keys), stream.filled_up(values))
        self.valid = valid if before is None else torch.cat([before, valid], dim=1)
        return past > 0

    def seen_by(self, stream: Stream) -> Tensor:
        """Which entries the rows just stored see, filled up in front, bool `[batch, 1, longest, kept]`."""
        new = stream.slots()[1].shape[1]
        past = self.get_seq_length() - new
        allowed = torch.ones(new, past + new, dtype=torch.bool, device=self.device).tril(past)
        return allowed[None, None] if self.valid is None else allowed & self.valid[:, None, None, :]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add tokens, all of which stay.

        Raises:
            PlanError: If they come from a model that would take this for the cache of all tokens.
        """
        if not self.awaits and self.valid is not None:
            raise PlanError(
                "Tokens have left this cache under a plan that eliminates them, and it is now used by a model without "
                "that plan. Start with a new cache."
            )
        self.awaits = False
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        tokens = key_states.shape[2]
        if self.valid is not None:
            new = self.new
            if new is None or new.shape[1] != tokens:
                new = self.valid.new_ones(self.valid.shape[0], tokens)
            self.valid = torch.cat([self.valid, new], dim=1)
        self.last, self.new = self.last + tokens, None
        return keys, values

    def mask(self, tokens: int, text: Tensor | None = None) -> Tensor | None:
        """Which keys the next tokens see, bool `[batch, 1, tokens, kept + tokens]`; None for all of them.

        Args:
            tokens: How many come.
            text: Which of them are text, bool `[batch, tokens]`; None for all.
        """
        valid = self.valid
        if text is not None and tokens > 1:
            self.new = text
            self.has_fillers = self.has_fillers or not bool(text.all())
        if valid is None:
            return None
        if tokens == 1 and not self.has_fillers:
            return None
        new = torch.ones(tokens, tokens, dtype=torch.bool, device=valid.device).tril()
        new = new.expand(valid.shape[0], 1, tokens, tokens)
        if self.new is not None:
            new = new & self.new[:, None, None, :]
        past = valid[:, None, None, :].expand(-1, 1, tokens, -1)
        return torch.cat([past, new], dim=3)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Raises:
            PlanError: If a positive number, the length to keep, is given: it would be counted in the whole text. If
                tokens are to go behind which others have left: which entries are theirs is not known any more.
        """
        wanted = int(tokens_to_remove)
        if wanted > 0:
            raise PlanError(
                f"Cannot crop to {wanted} tokens: this layer's cache holds only the tokens that stayed. Pass the "
                "number of tokens to remove, as a negative number."
            )
        if wanted == 0 or not self.is_initialized:
            return
        if -wanted > self.last:
            raise PlanError(
                f"Cannot remove the last {-wanted} tokens: some before the last {self.last} have left this layer's "
                "cache. Protect as many as may be taken back, with a window of that size."
            )
        super().crop(wanted)
        self.last += wanted
        if self.valid is not None:
            self.valid = self.valid[:, :wanted]

    def reset(self) -> None:
        """Back to empty."""
        super().reset()
        self.valid, self.has_fillers, self.last, self.new = None, False, 0, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        if self.valid is not None:
            self.valid = self.valid.index_select(0, beam_idx.to(self.valid.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        super().batch_repeat_interleave(repeats)
        if self.valid is not None:
            self.valid = self.valid.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        super().batch_select_indices(indices)
        if self.valid is not None:
            self.valid = self.valid[indices]


class ShorterStaticLayer(StaticLayer):
    """A static slot in which the places of tokens that left stay empty: shapes are those that a graph was compiled for.

    Attributes:
        valid: Which places are no longer empty for good, bool `[batch, max_cache_len]`; None before the first call.
    """

    valid: Tensor | None = None

    def store(self, keys: Tensor, values: Tensor, stream: Stream) -> bool:
        """As `ShorterLayer.store`."""
        past = int(self.get_seq_length())
        shape = (stream.batch, stream.tokens, *keys.shape[1:])
        super().update(*(stream.padded(t).view(shape).transpose(1, 2) for t in (keys, values)))
        if self.valid is None:
            self.valid = torch.ones(stream.batch, self.max_cache_len, dtype=torch.bool, device=keys.device)
            torch._dynamo.mark_static_address(self.valid)
        everything = torch.ones_like(self.valid[:, : stream.tokens])
        held = everything if stream.held is None else stream.held.mask.view_as(everything)
        self.valid[:, past : past + stream.tokens] = held
        return past > 0

    def seen_by(self, stream: Stream) -> Tensor:
        """As `ShorterLayer.seen_by`."""
        slots, filled = stream.slots()
        first = int(self.get_seq_length()) - stream.tokens
        token = stream.token_of(None)
        place = torch.arange(stream.rows, device=slots.device) if token is None else token
        own = (
            torch.full_like(filled, -1, dtype=torch.long)
            .flatten()
            .index_copy_(0, slots, place % stream.tokens + first)
        )
        key = torch.arange(self.max_cache_len, device=slots.device)
        allowed = key <= own.view_as(filled)[:, None, :, None]
        return allowed if self.valid is None else allowed & self.valid[:, None, None, :]

    def reset(self) -> None:
        """Back to empty."""
        super().reset()
        if self.valid is not None:
            self.valid.fill_(True)


def shorter_layer(cache: Cache, slot: int, mask: Any) -> ShorterLayer | ShorterStaticLayer:
    """The shorter layer in `slot`, put there if need be; what the slot held before stays.

    Args:
        cache: The model's cache.
        slot: Which layer's.
        mask: The attention mask of the call, which says what of the past is padding; None for nothing.

    Raises:
        PlanError: If the slot is of a kind that cannot lose tokens, such as a quantised cache's.
    """
    while len(cache.layers) <= slot:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[slot]
    if isinstance(layer, (ShorterLayer, ShorterStaticLayer)):
        return layer
    if type(layer) is StaticLayer:
        static = ShorterStaticLayer(layer.max_cache_len)
        static.__dict__.update(layer.__dict__)
        past = int(layer.get_seq_length())
        if past:
            static.valid = layer.keys.new_ones(layer.keys.shape[0], layer.max_cache_len, dtype=torch.bool)
            static.valid[:, :past] = _seen_before(mask, past, static.valid[:, :past])
            torch._dynamo.mark_static_address(static.valid)
        cache.layers[slot] = static
        return static
    if type(layer) is RoomLayer and not layer.is_sliding:
        layer = layer.dynamic()
    if type(layer) is not DynamicLayer:
        raise PlanError(
            f"Tokens cannot be eliminated from a cache whose layers are {type(layer).__name__}. Use a DynamicCache or "
            "a StaticCache, or patch the model without elimination."
        )
    shorter = ShorterLayer()
    past = layer.get_seq_length()
    if past:
        # Which attributes a layer has depends on the version of transformers.
        shorter.__dict__.update(layer.__dict__)
        seen = _seen_before(mask, past, layer.keys.new_ones(layer.keys.shape[0], past, dtype=torch.bool))
        shorter.valid, shorter.has_fillers, shorter.last = seen, not bool(seen.all()), past
    cache.layers[slot] = shorter
    return shorter


def _seen_before(mask: Any, past: int, everything: Tensor) -> Tensor:
    """Which of the past tokens are text, by the mask of a later call, bool `[batch, past]`."""
    if not isinstance(mask, Tensor):
        return everything
    last = mask[:, 0, -1] if mask.dim() == 4 else mask
    last = last if last.dtype == torch.bool else (last == 0 if mask.dim() == 4 else last.bool())
    return last[:, :past].expand_as(everything)


def mask_of_slot(cache: Cache | None, slot: int | None, tokens: int, mask: Any, implementation: Any) -> Any:
    """The attention mask for a layer whose slot may be shorter than those that the model's mask was made for.

    Args:
        cache: The model's cache.
        slot: The layer's slot.
        tokens: Tokens of this call.
        mask: The model's mask, returned where the slot is as long as the text.
        implementation: The name of the attention implementation, which decides what a mask looks like.

    Raises:
        PlanError: If the caller's own mask does more than padding explains: it was made for keys that have left.
    """
    if cache is None or slot is None or slot >= len(cache.layers):
        return mask
    layer = cache.layers[slot]
    if isinstance(layer, ShorterStaticLayer):
        return _without_empty_places(mask, layer)
    if not isinstance(layer, ShorterLayer):
        return mask
    own = any(mask is given for given in callers_masks())
    if own and read_mask(mask, layer.keys.shape[0], tokens, causal=True, own=True).kind != "plain":
        raise PlanError(
            "Tokens have left this layer's cache, and a mask of your own that does more than hide padding says which "
            "of all keys are seen. Pass a mask [batch, tokens] of ones and zeros, or patch the model without "
            "elimination."
        )
    text = own_key(mask, layer.keys.shape[0], tokens) if isinstance(mask, Tensor) and tokens > 1 else None
    allowed = layer.mask(tokens, text)
    layer.awaits = True
    if allowed is None or implementation == "sdpa":
        return allowed
    if "flash" in str(implementation) and layer.valid is not None:
        new = layer.valid.new_ones(allowed.shape[0], tokens) if text is None else text
        return torch.cat([layer.valid, new], dim=1)
    lowest = torch.finfo(layer.keys.dtype).min
    return torch.zeros(allowed.shape, dtype=layer.keys.dtype, device=allowed.device).masked_fill(
        ~allowed, lowest
    )


def _without_empty_places(mask: Any, layer: ShorterStaticLayer) -> Any:
    """The model's mask over all places of a static cache, without those whose tokens left."""
    if layer.valid is None or (not isinstance(mask, Tensor) and not int(layer.get_seq_length())):
        return mask
    if not isinstance(mask, Tensor):
        raise PlanError(
            "A static cache from which tokens were eliminated needs a mask, and this attention implementation makes "
            "none. Use attn_implementation='sdpa' or 'eager', or a DynamicCache."
        )
    if mask.dim() == 2:
        return mask.bool() & layer.valid[:, : mask.shape[1]]
    valid = layer.valid[:, None, None, : mask.shape[3]]
    if mask.dtype == torch.bool:
        return mask & valid
    return mask.masked_fill(~valid, torch.finfo(mask.dtype).min)

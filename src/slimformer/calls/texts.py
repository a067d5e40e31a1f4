"""Where the texts of a forward pass lie, for transforms that depend on how long a text is or where a token stands."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from slimformer.cache.slots import has_foreign_cache, layer_cache
from slimformer.cache.steps import Step, current_step
from slimformer.calls.masks import keys_seen
from slimformer.changes.call_context import call_variable
from slimformer.errors import DataError
from slimformer.model.anatomy import named_arguments

# Of the forward pass that runs in this thread or task.
_current: ContextVar[Texts | None] = call_variable("texts", None)


@dataclass(eq=False)
class Texts:
    """The texts of one forward pass, one in every row of the batch, with what a cache holds of them.

    Attributes:
        batch: How many.
        tokens: Tokens of each that this call computes, padding included.
        past: Tokens of each that the cache held before.
        device: Where the model computes.
        mask: Which of past and present are text, bool `[batch, past + tokens]`; None for all.
        positions: Position ids that the caller gave, `[1 or batch, tokens]`.
        cache: What holds the past.

    Example:
        >>> import torch
        >>> texts = Texts(2, 3, 0, torch.device("cpu"), torch.tensor([[0, 1, 1], [1, 1, 1]]).bool())
        >>> texts.lengths, texts.places()
        (tensor([2, 3]), tensor([[-1,  0,  1],
                [ 0,  1,  2]]))
    """

    batch: int
    tokens: int
    past: int
    device: torch.device
    mask: Tensor | None = None
    positions: Tensor | None = None
    cache: Cache | None = None

    @property
    def longest(self) -> int:
        """No text is longer than this; known without asking the device."""
        return self.past + self.tokens

    @cached_property
    def starts(self) -> Tensor:
        """Where every text begins among past and present, int64 `[batch]`: behind padding in front."""
        if self.mask is None:
            return torch.zeros(self.batch, dtype=torch.int64, device=self.device)
        return self.mask.int().argmax(1)

    @cached_property
    def lengths(self) -> Tensor:
        """How many tokens every text has up to the end of this call, int64 `[batch]`, without padding."""
        if self.mask is None:
            return torch.full((self.batch,), self.longest, dtype=torch.int64, device=self.device)
        return self.mask.sum(1)

    def lengths_before(self) -> Tensor:
        """How many tokens of every text the cache held before this call, int64 `[batch]`."""
        if self.mask is None:
            return torch.full((self.batch,), self.past, dtype=torch.int64, device=self.device)
        return self.mask[:, : self.past].sum(1)

    def places(self) -> Tensor:
        """Where each token of this call stands in its text, int64 `[batch, tokens]`; negative in front of it."""
        return torch.arange(self.past, self.longest, device=self.device) - self.starts[:, None]

    @cached_property
    def layout(self) -> tuple[Tensor, Tensor, Tensor]:
        """Positions, offsets and ranges of all tokens of this call, as `slimformer_kernels.attention_rows` takes them.

        Made once for all layers: small tensors take as long to make as a step of decoding takes to attend.
        """
        own = torch.arange(self.past, self.longest, device=self.device)
        offsets = torch.arange(self.batch + 1, device=self.device) * self.tokens
        ranges = torch.stack([self.starts, self.starts + self.lengths], 1)
        return own.expand(self.batch, self.tokens).reshape(-1), offsets, ranges

    def check_longer_than(self, trained: int, capacity: float, remedy: Callable[[int], str]) -> bool:
        """Whether some text may be longer than the model was trained for; all that is checked waits for the device.

        Args:
            trained: The trained length.
            capacity: The length that the method reaches.
            remedy: Says what to do about a text of so many tokens, the end of the error message.

        Raises:
            DataError: If a text is longer than `capacity`, padding lies inside a text, or a row holds several texts.
        """
        if self.longest <= trained or not self._checked_longest > trained:
            return False
        if self._checked_longest > capacity:
            raise DataError(
                f"A text has {self._checked_longest} tokens, and the limit is {int(capacity)}. "
                + remedy(self._checked_longest)
            )
        return True

    @cached_property
    def _checked_longest(self) -> int:
        """The length of the longest text, after a look at what else the rows hold."""
        if self.mask is None:
            ids = self.positions
            if ids is not None and ids.dim() == 2 and ids.shape[1] > 1 and bool((ids.diff(dim=1) != 1).any()):
                raise DataError(
                    "Position ids are not consecutive, as where several texts are packed into one row. Methods that "
                    "change positions need one text per row: pad the batch and pass an attention mask."
                )
            return self.longest
        ends = self.mask.shape[1] - self.mask.flip(1).int().argmax(1)
        if bool((ends - self.starts != self.lengths).logical_and(self.lengths > 0).any()):
            raise DataError(
                "The attention mask hides tokens inside a text. Methods that depend on where a token stands need "
                "padding at the ends only: remove the hidden tokens."
            )
        return int(self.lengths.max())


@dataclass(eq=False)
class SteppedTexts(Texts):
    """The texts of a decode step that is prepared to be replayed, whose lengths the device alone knows.

    What a method does once, where a text has come to be so long, it does in a step that is not replayed; see
    `Attentions.read_texts`.

    Attributes:
        step: The step.
    """

    step: Step = field(kw_only=True)

    @property
    def longest(self) -> int:
        """No text is longer than its room."""
        return self.step.room

    @cached_property
    def starts(self) -> Tensor:
        """As above."""
        return self.step.ranges[:, 0]

    @cached_property
    def lengths(self) -> Tensor:
        """As above."""
        return self.step.ranges[:, 1] - self.step.ranges[:, 0]

    def lengths_before(self) -> Tensor:
        """As above."""
        return self.lengths - self.tokens

    def places(self) -> Tensor:
        """As above."""
        return self.step.place - self.starts[:, None]

    @cached_property
    def layout(self) -> tuple[Tensor, Tensor, Tensor]:
        """As above."""
        offsets = torch.arange(self.batch + 1, device=self.device) * self.tokens
        return self.step.place.expand(self.batch, self.tokens).reshape(-1), offsets, self.step.ranges

    def check_longer_than(self, trained: int, capacity: float, remedy: Callable[[int], str]) -> bool:
        """Whether some text may be longer; one that exceeds the capacity is in no step like this."""
        return self.longest > trained


def current_texts(batch: int, tokens: int, device: torch.device) -> Texts:
    """The texts of the forward pass that runs; where a layer is called by itself, whole rows without a past."""
    found = _current.get()
    if found is None or (found.batch, found.tokens) != (batch, tokens):
        return Texts(batch, tokens, 0, device)
    return found


@dataclass
class TextReader:
    """Stands in for a stack's `forward`, and notes where the texts are while it runs.

    Attributes:
        names: Its positional parameters.
        had: The stack's own.
    """

    names: tuple[str, ...]
    had: Callable[..., Any] = field(init=False)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The stack's own `forward`, whose signature tells others what they may pass."""
        return self.had

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The stack's own `forward`, with the same arguments."""
        given = named_arguments(self.names, args, kwargs)
        token = _current.set(_texts_of(given))
        try:
            return self.had(*args, **kwargs)
        finally:
            _current.reset(token)


def _texts_of(given: dict[str, Any]) -> Texts | None:
    source = given.get("input_ids")
    source = given.get("inputs_embeds") if source is None else source
    if not isinstance(source, Tensor):
        return None
    if given.get("cu_seq_lens_q") is not None:
        raise DataError(
            "Texts came behind each other in one row (cu_seq_lens_q). Methods that depend on where a token stands "
            "need one text per row: pad the batch and pass an attention mask."
        )
    if has_foreign_cache(given):
        raise DataError(
            "The key-value cache is of a kind of its own, such as the pages of continuous batching, and does not say "
            "how long texts are. Use generate with a DynamicCache or StaticCache."
        )
    batch, tokens = source.shape[:2]
    step = current_step()
    if step is not None:
        return SteppedTexts(batch, tokens, 0, source.device, step=step)
    cache = layer_cache(given)
    past = 0 if cache is None else int(cache.get_seq_length())
    return Texts(
        batch,
        tokens,
        past,
        source.device,
        _text_mask(given.get("attention_mask"), batch, past + tokens),
        given.get("position_ids"),
        cache,
    )


def _text_mask(mask: Any, batch: int, keys: int) -> Tensor | None:
    """Which keys are text, bool `[batch, keys]`, from a mask of any of the kinds that a stack takes."""
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 4:
        mask = keys_seen(mask)
    # A static cache's mask has places for tokens that are still to come.
    return mask[:, :keys].bool().expand(batch, -1) if mask.shape[1] >= keys else None

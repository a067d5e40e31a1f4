"""Which tokens of a text stay at a layer: the ones with the highest scores, and those that are protected."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch
from torch import Tensor

from slimformer.changes.call_context import call_variable, setting
from slimformer.errors import PlanError
from slimformer.methods.elimination.token_scores import TextTokens, TokenScore
from slimformer.rows.rows import Rows
from slimformer.rows.stream import Stream

_NONE: tuple[tuple[object, Tensor], ...] = ()
# The masks of open blocks, each with the method that it was given to.
open_blocks = call_variable("protected", _NONE)


def protecting(owner: object, mask: Tensor) -> contextlib.AbstractContextManager[None]:
    """Tokens that stay in every call made within the block, whatever their scores, also in threads started in it.

    Args:
        owner: The method whose tokens they are.
        mask: bool `[batch, tokens]` over the prompt, padding included; tokens behind its end are not protected.

    Raises:
        PlanError: If the mask is none.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != 2:
        came = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise PlanError(f"protecting(mask) takes a bool tensor [batch, tokens], got {came}.")
    return setting(open_blocks, (*open_blocks.get(), (owner, mask)))


@dataclass(frozen=True, eq=False)
class Owner:
    """The method that a row selector belongs to, which copies of a patched model share with it."""

    method: object

    def __deepcopy__(self, known: object) -> Owner:
        """A copied model heeds the same method's blocks."""
        return self


def protected_tokens(owner: Owner, stream: Stream) -> Tensor | None:
    """Which tokens of this call a method must keep, bool `[batch, tokens]`; None if nothing is protected.

    Raises:
        PlanError: If the mask has another number of texts than the call.
    """
    mask = next((mask for method, mask in reversed(open_blocks.get()) if method is owner.method), None)
    if mask is None:
        return None
    batch, tokens = stream.batch, stream.tokens
    if batch % mask.shape[0]:
        raise PlanError(
            f"protecting(mask) has {mask.shape[0]} texts, and the model was called with {batch}. Give a row for each "
            "of them."
        )
    past = max(int(stream.earlier), 0)
    # Beams and samples of one prompt stand behind each other.
    rows = mask.to(stream.device).repeat_interleave(batch // mask.shape[0], 0)[:, past : past + tokens]
    full = torch.zeros(batch, tokens, dtype=torch.bool, device=stream.device)
    full[:, : rows.shape[1]] = rows
    return full


@dataclass(frozen=True)
class TokenSelection:
    """The row selector of one layer.

    Attributes:
        score: A number per token.
        owner: The method that it belongs to.
        keep: The fraction of the text's tokens that stays, or with `threshold` how many times the mean score of its
            text a token needs to stay.
        threshold: Which of the two `keep` is.
        block: Tokens come and go in blocks of so many neighbours.
        sink: The first tokens always stay.
        window: The last tokens always stay.
        least: The shortest text from which tokens go.
        leave: Whether the others leave for good, caches included.
        mean_behind: Whether tokens that left come out as the mean of those that stayed.
    """

    score: TokenScore
    owner: Owner = field(repr=False)
    keep: float
    threshold: bool = False
    block: int = 1
    sink: int = 4
    window: int = 64
    least: int = 256
    leave: bool = True
    mean_behind: bool = False

    @torch.no_grad()
    def __call__(self, stream: Stream, x: Tensor) -> Rows | None:
        """The rows of the residual `x` `[rows, hidden]` that stay; None if all do."""
        if stream.tokens < self.least or (self.keep == 1.0 and not self.threshold):
            return None
        padding = stream.padding_mask()
        here = padding if stream.held is None else padding & stream.held.mask.view_as(padding)
        # Places and lengths count the whole text, so that a schedule says what it means whatever left before.
        text = TextTokens(here, (padding.cumsum(1) - 1).clamp_min(0), padding.sum(1))
        stay = self._chosen(text, self.score(stream, x, text)) | self._protected(text, stream)
        stay = (stay | (text.length < self.least)[:, None]) & here
        mask = stay.flatten() if stream.held is None else stay.flatten()[stream.held.index]
        return Rows(x.shape[0], given_mask=mask, evict_caches=self.leave, mean_behind=self.mean_behind)

    def _chosen(self, text: TextTokens, score: Tensor) -> Tensor:
        """Those whose score is high enough, bool `[batch, tokens]`."""
        if self.block > 1:
            score = _over_blocks(score, text, self.block, "mean")
        if self.threshold:
            count = text.here.sum(1, keepdim=True).clamp_min(1)
            mean = score.masked_fill(~text.here, 0.0).sum(1, keepdim=True) / count
            return text.here & (score >= self.keep * mean)
        always = text.here & self._at_the_ends(text)
        if self.block > 1:
            always = text.here & (_over_blocks(always.float(), text, self.block, "amax") > 0)
        score = score.masked_fill(always, float("inf")).masked_fill(~text.here, float("-inf"))
        rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        target = (text.length.double() * self.keep).ceil().clamp(min=1)
        stay = text.here & (rank < target[:, None])
        if self.block > 1:
            return text.here & (_over_blocks(stay.float(), text, self.block, "amax") > 0)
        return stay

    def _protected(self, text: TextTokens, stream: Stream) -> Tensor:
        ends, mask = self._at_the_ends(text), protected_tokens(self.owner, stream)
        return ends if mask is None else ends | mask

    def _at_the_ends(self, text: TextTokens) -> Tensor:
        return (text.place < self.sink) | (text.place >= text.length[:, None] - self.window)


@dataclass(frozen=True)
class SharedSelection:
    """One selection for both sublayers of a layer, made by whichever runs first.

    Attributes:
        selection: The selection.
        layer: Which layer's.
    """

    selection: TokenSelection
    layer: int

    def __call__(self, stream: Stream, x: Tensor) -> Rows | None:
        """As the selection."""
        choices, key = stream.derived(None), (self.selection, self.layer)
        if key not in choices:
            choices[key] = self.selection(stream, x)
        found: Rows | None = choices[key]
        return found


def _over_blocks(value: Tensor, text: TextTokens, block: int, reduce: str) -> Tensor:
    """Mean or maximum over the tokens of the block that each token is in, float32 `[batch, tokens]`."""
    number, blocks = text.place // block, -(-value.shape[1] // block)
    # Tokens that are not there count in a block of their own.
    number = torch.where(text.here, number, blocks)
    start = value.new_zeros(value.shape[0], blocks + 1)
    reduced = start.scatter_reduce(1, number, value, reduce, include_self=False)
    return reduced.gather(1, number)

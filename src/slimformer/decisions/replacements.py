"""What a dropped sublayer can leave behind: its mean output, or a causal linear filter of its inputs.

Sublayers are dropped by LLM-Drop (arXiv 2406.15786); a filter of one tap is the closed-form linearisation of neural
block linearization. Both are fitted by `slimformer.calibration.drops.fitting`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slimformer.cache.filter_state import FilterState, filter_state
from slimformer.cache.slots import has_foreign_cache, layer_cache
from slimformer.cache.steps import current_step
from slimformer.calls.masks import is_hidden
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.model.layer_parts import Kind

Replace = Literal["nothing", "mean", "filter"]
REPLACE: tuple[Replace, ...] = ("nothing", "mean", "filter")


def weight_names(kind: Kind) -> tuple[str, str]:
    """Names of the buffers that a replacement has on its layer: matrix and bias."""
    return f"slimformer_{kind}_weight", f"slimformer_{kind}_bias"


@dataclass
class Mean:
    """Adds the same vector to every token.

    Attributes:
        layer: The layer that holds the vector, as a buffer that is not saved with the model.
        kind: The sublayer that is replaced.
    """

    layer: nn.Module
    kind: Kind
    by_row = True

    def __call__(self, residual: Tensor, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The addition to the residual, `[hidden]`, the same for every token."""
        return self.vector()

    def vector(self) -> Tensor:
        """That addition."""
        bias: Tensor = getattr(self.layer, weight_names(self.kind)[1])
        return bias


@dataclass
class LinearFilter:
    """Adds `b + sum over j of A_j x[t - j]`, with `x` the sublayer's normed input and as many `A_j` as taps.

    In a decoder `j` runs from 0 to `taps - 1`, so only the past is read, and the last inputs are kept in the cache
    slot of the attention that the filter replaces. In an encoder the taps lie around the token, which is at index
    `taps // 2`. Padding is read as zero.

    Attributes:
        layer: The layer that holds `[hidden, taps * hidden]`, oldest input first, and `[hidden]` as buffers.
        kind: The sublayer that is replaced.
        taps: How many inputs are read.
        causal: Whether the model is a decoder.
        slot: The cache slot for the filter's state.
    """

    layer: nn.Module
    kind: Kind
    taps: int
    causal: bool
    slot: int

    @property
    def by_row(self) -> bool:
        """Whether a token's addition depends on no other, so that rows may come without their batch."""
        return self.taps == 1

    def __call__(self, residual: Tensor, normed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The addition to the residual `[batch, tokens, hidden]`."""
        matrix, vector = weight_names(self.kind)
        weight, bias = getattr(self.layer, matrix), getattr(self.layer, vector)
        if self.taps == 1:
            return F.linear(normed, weight, bias)
        state = self._state(kwargs)
        # The new token of a step that may be replayed is text, and behind padding in front there is nothing else.
        mask = None if current_step() is not None else kwargs.get("attention_mask")
        seen = None if state is None else state.seen
        inputs = zero_padding(normed, mask, seen)
        # Before the state counts these tokens in, in place where the cache is static.
        visible = visible_taps(mask, normed.shape[1], seen, *filter_reach(self.taps, self.causal))
        if state is not None:
            window = state.extend(inputs)
        else:
            window = F.pad(inputs, (0, 0, *filter_reach(self.taps, self.causal)))
        positions = kwargs.get("position_ids") if self.causal else None
        return apply_taps(window, weight, bias, self.taps, positions, visible)

    def _state(self, kwargs: dict[str, Any]) -> FilterState | None:
        if not self.causal:
            return None
        if has_foreign_cache(kwargs):
            raise PlanError(
                "A filter of several taps remembers the last inputs of every text in the key-value cache, and this one "
                "is of a kind of its own, such as the pages of continuous batching. Use generate, or taps=1."
            )
        return filter_state(layer_cache(kwargs), self.slot, self.taps)


def keeps_state(replacement: object) -> bool:
    """Whether a replacement remembers earlier inputs in the cache slot of the attention."""
    return isinstance(replacement, LinearFilter) and replacement.causal and replacement.taps > 1


def taps_of(kind: Kind, taps: int) -> int:
    """How many inputs the filter of a sublayer reads: an MLP computes from its own token, so one is all it can use."""
    return taps if kind == "attention" else 1


def filter_reach(taps: int, causal: bool) -> tuple[int, int]:
    """How many inputs before and after its token a filter reads.

    Example:
        >>> filter_reach(4, causal=True), filter_reach(4, causal=False)
        ((3, 0), (2, 1))
    """
    before = taps - 1 if causal else taps // 2
    return before, taps - 1 - before


def apply_taps(
    window: Tensor,
    weight: Tensor,
    bias: Tensor,
    taps: int,
    positions: Tensor | None = None,
    visible: Tensor | None = None,
) -> Tensor:
    """The filter's output for every token, one matrix product per tap.

    Args:
        window: Inputs with those that the first and last tokens also read `[batch, taps - 1 + tokens, hidden]`.
        weight: `[hidden, taps * hidden]`, oldest input first.
        bias: `[hidden]`.
        taps: How many inputs a token reads.
        positions: Position of every token in its text `[batch, tokens]`; the token at position p has only p before
            it, so taps that reach further back, into another text of a packed batch, read zero.
        visible: Which inputs each token may read, bool `[batch, tokens, taps]`; others read zero.

    Returns:
        `[batch, tokens, hidden]`.
    """
    tokens = window.shape[1] - (taps - 1)
    if tokens == 1:
        if visible is not None:
            window = torch.where(visible[:, 0, :, None], window, 0.0)
        return F.linear(window.flatten(1), weight, bias)[:, None]
    output: Tensor | None = None
    for index, matrix in enumerate(weight.chunk(taps, dim=1)):
        back = taps - 1 - index
        read = window[:, index : index + tokens]
        if positions is not None and positions.dim() == 2 and back:
            read = torch.where((positions >= back)[..., None], read, 0.0)
        if visible is not None:
            read = torch.where(visible[..., index, None], read, 0.0)
        term = F.linear(read, matrix, bias if index == 0 else None)
        output = term if output is None else output + term
    return bias.expand_as(window[:, :tokens]) if output is None else output


def zero_padding(x: Tensor, mask: Any, seen: int | Tensor | None) -> Tensor:
    """Set padding to zero in `x` `[batch, tokens, hidden]`, by what the layer's attention mask says.

    A token that may not attend to itself is padding, in the masks of every attention implementation.

    Args:
        x: The sublayer's input.
        mask: What the layer got: none, `[batch, keys]`, or `[batch, 1, tokens, keys]` as booleans or as additions.
        seen: How many tokens the cache held before; None without a cache.

    Raises:
        UnsupportedModelError: If the mask is of another kind.
    """
    if mask is None:
        return x
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise UnsupportedModelError(
            f"A filter of several taps must know which tokens are padding, and cannot read it from a mask of type "
            f"{type(mask).__name__}. Load the model with attn_implementation='sdpa', or use taps=1."
        )
    own = _own_keys(mask, x.shape[1], seen)
    if mask.dim() == 2:
        real = mask.index_select(1, own).bool()
    else:
        # A mask of one row per batch serves every query.
        rows = mask[:, 0].expand(-1, x.shape[1], -1)
        real = ~is_hidden(rows.gather(2, own.view(1, -1, 1).expand(rows.shape[0], -1, 1)).squeeze(2))
    return torch.where(real[..., None].to(x.device), x, 0.0)


def visible_taps(mask: Any, tokens: int, seen: int | Tensor | None, before: int, after: int) -> Tensor | None:
    """Which of its neighbours each token may read, as a mask of queries and keys says, where texts are packed.

    Args:
        mask: As `zero_padding` takes it.
        tokens: Tokens of this call.
        seen: How many tokens the cache held before; None without a cache.
        before: How many neighbours before the token are read.
        after: And how many behind it.

    Returns:
        bool `[1 or batch, tokens, before + 1 + after]`; None where the mask says the same to every query.
    """
    if mask is None or mask.dim() != 4 or mask.shape[2] != tokens:
        return None
    # What no head sees; a bias does not hide.
    rows = mask[:, 0] if mask.shape[1] == 1 else (mask.any(1) if mask.dtype == torch.bool else mask.amax(1))
    key = _own_keys(mask, tokens, seen)[:, None] + torch.arange(-before, after + 1, device=mask.device)
    read = rows.gather(2, key.clamp(0, rows.shape[2] - 1).expand(rows.shape[0], -1, -1))
    # A token's own input is its own, and what lies outside the mask is zero already.
    always = (key < 0) | (key >= rows.shape[2])
    always[:, before] = True
    return ~is_hidden(read) | always


def _own_keys(mask: Tensor, tokens: int, seen: int | Tensor | None) -> Tensor:
    """Which keys of a mask are this call's tokens, int64 `[tokens]`."""
    # Keys end with them, unless the cache is longer than what it has seen, as static ones are.
    first: int | Tensor = mask.shape[-1] - tokens
    if isinstance(seen, Tensor):
        first = seen.clamp(max=mask.shape[-1] - tokens)
    return first + torch.arange(tokens, device=mask.device)

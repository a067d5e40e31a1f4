"""What the slots of a key-value cache hold under a patch, so that no other patch reads them as something else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from slimformer.cache.filter_state import mark_empty_slots
from slimformer.cache.slots import Content, layer_cache
from slimformer.errors import PlanError
from slimformer.model.anatomy import named_arguments, positional_names

# Where a cache carries the layout by which it was filled.
_STAMP = "_slimformer_layout"


@dataclass(frozen=True)
class CacheLayout:
    """Where every layer keeps what.

    Attributes:
        slots: The slot of every layer.
        contents: What it holds.
        angles: What turns cached keys otherwise than the model itself, and the length of texts up to which it does not.
    """

    slots: tuple[int, ...]
    contents: tuple[Content, ...]
    angles: tuple[str, int] | None = None

    @staticmethod
    def dense(layers: int) -> CacheLayout:
        """That of an unpatched model."""
        keys: Content = "keys"
        return CacheLayout(tuple(range(layers)), (keys,) * layers)

    def reads(self, other: CacheLayout, length: int) -> bool:
        """Whether a cache of so many tokens that was filled by `other` is what a model with this layout expects."""
        if self.slots != other.slots:
            return False
        pairs = zip(self.contents, other.contents, strict=True)
        if not all(own == there or (own, there) == ("keys that stay", "keys") for own, there in pairs):
            return False
        if self.angles == other.angles:
            return True
        return all(angles is None or length <= angles[1] for angles in (self.angles, other.angles))

    @property
    def empty_slots(self) -> list[int]:
        """Slots in which nothing is kept."""
        return [slot for slot, content in zip(self.slots, self.contents, strict=True) if content == "nothing"]


@dataclass
class CacheOwner:
    """Stands in for the `forward` of the first layer, and looks at the cache before any layer reads it.

    A cache carries the layout by which it was filled. One that carries none and is not empty was filled by the
    unpatched model, or by what puts learned prefixes there.

    Attributes:
        layer: The first layer.
        layout: That of the patch.
        had: The layer's own `forward`.
    """

    layer: nn.Module
    layout: CacheLayout
    had: Callable[..., Any] = field(init=False)

    def __post_init__(self) -> None:
        self.names = positional_names(self.layer)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own `forward`, with the same arguments.

        Raises:
            PlanError: If the cache was filled under another layout.
        """
        given = kwargs if len(args) < 2 else named_arguments(self.names, args, kwargs)
        cache = layer_cache(given)
        if cache is not None:
            self.check(cache)
        return self.had(*args, **kwargs)

    def check(self, cache: Cache) -> None:
        """Refuse a cache that this layout cannot read, and let the others carry it."""
        if torch.compiler.is_compiling():
            # Only written: what is read would be compiled for, once without and once with a layout.
            stamp(cache, self.layout)
            return
        found: CacheLayout | None = getattr(cache, _STAMP, None)
        if found is self.layout:
            return
        if found != self.layout:
            length = _tokens_in(cache)
            if length and not self.layout.reads(found or CacheLayout.dense(len(self.layout.slots)), length):
                raise PlanError(self._mismatch(found, length))
            if not length:
                mark_empty_slots(cache, self.layout.empty_slots)
        stamp(cache, self.layout)

    def _mismatch(self, found: CacheLayout | None, length: int) -> str:
        by = "by a model that was not patched" if found is None else "under another plan"
        advice = "" if found is not None else " A learned prefix (PEFT) needs a plan that drops no attention."
        return (
            f"The cache holds {length} tokens that were put there {by}, and the layers of this model would read keys "
            f"of other layers, or of other positions. Start with a new cache.{advice}"
        )


def stamp(cache: Cache, layout: CacheLayout) -> None:
    """Say by which layout a cache was filled."""
    setattr(cache, _STAMP, layout)


def copy_stamp(cache: Cache, to: Cache) -> None:
    """Let a cache that holds the same say so."""
    if hasattr(cache, _STAMP):
        setattr(to, _STAMP, getattr(cache, _STAMP))


def _tokens_in(cache: Cache) -> int:
    """How many tokens some layer of a cache holds; at least 1 where a state without a length is kept."""
    most = 0
    for layer in cache.layers:
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            most = max(most, int(layer.get_seq_length()))
        elif any(getattr(layer, "has_previous_state", {}).values()):
            most = max(most, 1)
    return most

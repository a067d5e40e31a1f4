"""The model under its draft's plan: a second set of modules over the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimformer.cache.layout import CacheLayout


@dataclass
class DraftModel:
    """The draft, made anew where the model got other weights, adapters or another device since.

    Attributes:
        model: It.
        layout: Where its layers keep what in a cache.
        of_model: Where those of the model do.
        bounds: Lengths of texts behind which one of both does something once, such as turning what is cached.
        replays: Whether its steps are replayed from graphs.
        tensors: The model's, with which it was made.
    """

    model: Any
    layout: CacheLayout
    of_model: CacheLayout
    bounds: frozenset[int]
    replays: Callable[[], bool]
    tensors: list[Tensor] = field(repr=False)

    def fits(self, model: nn.Module) -> bool:
        """Whether the model still computes with the tensors that the draft shares."""
        now = tensors_of(model)
        return len(now) == len(self.tensors) and all(a is b for a, b in zip(now, self.tensors, strict=True))

    def inputs(self, ids: Tensor, reads: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments for the last `reads` tokens of `ids` `[1, tokens]`."""
        given: dict[str, Any] = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=reads, is_first_iteration=False, **kwargs
        )
        if self.model._supports_logits_to_keep():
            given["logits_to_keep"] = 1
        return {**given, "use_cache": True, "return_dict": True}


# Makes the draft of a model.
MakesDraft = Callable[[], DraftModel]


def tensors_of(model: nn.Module) -> list[Tensor]:
    """The tensors that a model computes with."""
    return [*model.parameters(), *model.buffers()]

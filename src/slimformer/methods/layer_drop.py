"""Drop attention and MLP sublayers whose input and output are alike (LLM-Drop, arXiv 2406.15786)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slimformer.anatomy import Anatomy, Kind
from slimformer.errors import PlanError
from slimformer.executor import SublayerPlan


@dataclass(frozen=True)
class LayerDrop:
    """Sublayers that compute no token at all; the norm in front of each goes with it.

    Attributes:
        attention: Layers whose attention is dropped; their keys and values are not cached either.
        mlp: Layers whose MLP is dropped.
        block: Layers of which both are dropped.

    Raises:
        PlanError: If an index is not a non-negative integer, or stands twice in a list.

    Example:
        >>> LayerDrop(attention=[21, 24]).attention
        (21, 24)
    """

    attention: Sequence[int] = ()
    mlp: Sequence[int] = ()
    block: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name in ("attention", "mlp", "block"):
            given = tuple(getattr(self, name))
            for index in given:
                if isinstance(index, bool) or not isinstance(index, int) or index < 0:
                    raise PlanError(f"LayerDrop({name}=...) takes layer indices from 0 up, got {index!r}.")
            if len(set(given)) != len(given):
                raise PlanError(f"LayerDrop({name}={list(given)}) names a layer twice.")
            object.__setattr__(self, name, given)

    def sublayer_plans(self, anatomy: Anatomy) -> dict[tuple[int, Kind], SublayerPlan]:
        """No rows for every dropped sublayer."""
        kinds: dict[Kind, tuple[int, ...]] = {
            "attention": (*self.attention, *self.block),
            "mlp": (*self.mlp, *self.block),
        }
        count = len(anatomy.layers)
        for kind, layers in kinds.items():
            for index in layers:
                if index >= count:
                    raise PlanError(
                        f"LayerDrop names {kind} {index}, but {type(anatomy.stack).__name__} has {count} layers: "
                        f"allowed are 0 to {count - 1}."
                    )
        return {
            (index, kind): SublayerPlan(compute=False) for kind, layers in kinds.items() for index in layers
        }

"""What a method decides for a sublayer: whether it is computed at all, for which rows, and with what in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from slimformer.changes.ledger import Ledger
from slimformer.decisions.selection import RowSelector
from slimformer.errors import PlanError
from slimformer.model.anatomy import Anatomy
from slimformer.model.layer_parts import Kind

# What stands in for a sublayer that computes no rows: (residual, normed input, layer arguments) -> addition. One with a
# true attribute `by_row` takes rows `[rows, hidden]` too.
Replacement = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass
class Decision:
    """What is decided for one sublayer.

    Attributes:
        compute: Whether any row is computed.
        replacement: Makes what is added instead where none is, given the layer, whether the model is a decoder,
            and the cache slot of the layer's attention.
        weights: What the replacement reads, put on the layer as buffers that its `state_dict` leaves out.
        rows: Name the rows to compute; those that all of them keep are. None of them means all rows.
        compact_keys: Whether rows that an attention does not compute supply no keys and values either.
        not_evicted: Name the rows that stay in the stream from this layer on; no later layer computes the others. Read
            from the plan of the layer's attention, before which the others leave.
        evict_caches: Whether some of those others leave the caches of this layer and later ones too.
        changes: Names of parameters within the layer, and what each becomes. They count whatever else is decided.
        prepares: Get the whole model and its ledger when it is patched, each once, when its layers are.
    """

    compute: bool = True
    replacement: Callable[[nn.Module, bool, int], Replacement] | None = None
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    rows: tuple[RowSelector, ...] = ()
    compact_keys: bool = False
    not_evicted: tuple[RowSelector, ...] = ()
    evict_caches: bool = False
    changes: tuple[tuple[str, Callable[[Tensor], Tensor]], ...] = ()
    prepares: tuple[Callable[[Any, Ledger], None], ...] = ()

    def __and__(self, other: Decision) -> Decision:
        """Both decisions: what one drops is dropped, and rows are those that both keep.

        Raises:
            PlanError: If both leave something in the sublayer's place.
        """
        if not (self.compute and other.compute):
            gone = self if not self.compute else other
            if not (self.compute or other.compute):
                gone = self if other.replacement is None else other
                if self.replacement is not None and other.replacement is not None:
                    raise PlanError(
                        "Two methods leave something in place of the same sublayer, and only one can stand there. "
                        "Take the sublayer out of one of them."
                    )
            return Decision(
                False,
                gone.replacement,
                gone.weights,
                not_evicted=self.not_evicted + other.not_evicted,
                evict_caches=self.evict_caches or other.evict_caches,
                changes=self.changes + other.changes,
                prepares=self.prepares + other.prepares,
            )
        return Decision(
            rows=self.rows + other.rows,
            compact_keys=self.compact_keys or other.compact_keys,
            not_evicted=self.not_evicted + other.not_evicted,
            evict_caches=self.evict_caches or other.evict_caches,
            changes=self.changes + other.changes,
            prepares=self.prepares + other.prepares,
        )


@runtime_checkable
class TokenPolicy(Protocol):
    """A method that decides which rows sublayers compute."""

    def decisions(self, anatomy: Anatomy) -> dict[tuple[int, Kind], Decision]:
        """The decision for every sublayer it touches, keyed by (layer, kind).

        Raises:
            PlanError: If the method names what the model does not have.
        """
        ...

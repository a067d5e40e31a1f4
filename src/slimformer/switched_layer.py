"""A layer whose arithmetic is not known: whole sublayers and whole layers can be switched off, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from slimformer.anatomy import Anatomy, positional_names
from slimformer.cache import CACHE_NAMES, Content, layer_cache, leave_slot_empty
from slimformer.errors import UnsupportedModelError
from slimformer.executor import SublayerPlan
from slimformer.ledger import Ledger
from slimformer.replacements import Mean
from slimformer.row_selection import RowSelector
from slimformer.structures import KINDS, Kind
from slimformer.sublayer_modules import SublayerModules, Zeros
from slimformer.touched_modules import has_own_forward


@dataclass
class SwitchedLayer:
    """Runs a layer's own `forward`, in which the modules of dropped sublayers compute nothing.

    A sublayer that is dropped adds what the layer makes of zeros: nothing behind most norms, the bias of one that has a
    bias. A layer of which both sublayers are dropped hands its input on.

    Attributes:
        layer: The layer.
        modules: The modules of its sublayers.
        why: Why no more than this is possible, in words.
        sublayers: The plan of each sublayer.
        shortens: Whether its cache may hold fewer tokens than the text has; never.
    """

    layer: nn.Module
    modules: SublayerModules
    why: str = ""
    sublayers: dict[Kind, SublayerPlan] = field(
        default_factory=lambda: {kind: SublayerPlan() for kind in KINDS}
    )
    shortens: bool = False

    def computes(self, kind: Kind) -> str:
        """Whether a sublayer is computed, in two words."""
        return "all rows" if self.sublayers[kind].compute else "dropped"

    def keep_ratio(self, kind: Kind) -> float | None:
        """No policy names rows here."""
        return None

    @property
    def in_cache(self) -> Content:
        """What the cache slot of the layer's token mixer holds."""
        dropped = [kind for kind in KINDS if not self.sublayers[kind].compute]
        if "attention" not in dropped or (len(dropped) == 1 and not self._silences_cache()):
            return "keys"
        return "nothing"

    def _silences_cache(self) -> bool:
        """Whether the module that writes to the cache is silent where the attention is dropped, not one behind it."""
        silent = [self.layer.get_submodule(entry.path) for entry in self.modules.silent.get("attention", ())]
        return any(name in CACHE_NAMES for module in silent for name in positional_names(module))

    def selectors(self) -> list[RowSelector]:
        """Nothing names rows here."""
        return []

    def placed(self, anatomy: Anatomy, index: int, shorter_from: int) -> None:
        """Nothing here depends on where in the stack the layer is."""

    def install(self, ledger: Ledger, slot: int, counting: bool, causal: bool) -> None:
        """Switch off what is dropped.

        Args:
            ledger: Where changes are written down.
            slot: The cache slot of the layer's token mixer.
            counting: Whether positions are counted in the slot of this layer or a higher one.
            causal: Whether the model is a decoder.

        Raises:
            UnsupportedModelError: If something else is asked for than to drop, or what is to be dropped cannot be.
        """
        # No slot is moved here.
        index = slot
        self._check(index)
        dropped = [kind for kind in KINDS if not self.sublayers[kind].compute]
        if dropped and has_own_forward(self.layer):
            raise self._impossible(
                "part", index, "its forward was replaced by somebody else's, whose parts are not known"
            )
        bare = all(self.sublayers[kind].replacement is None for kind in KINDS)
        if len(dropped) == len(KINDS) and bare:
            if "block" in self.modules.reasons:
                raise self._impossible("the whole", index, self.modules.reasons["block"])
            name = positional_names(self.layer)[0]
            ledger.set_forward(self.layer, _Bypass(self.modules.returns, name, partial(_leave_empty, index)))
            return
        for kind in dropped:
            if kind not in self.modules.silent:
                raise self._impossible(f"the {kind}", index, self.modules.reasons.get(kind, self.why))
            self._silence(kind, ledger, index, causal)

    def _silence(self, kind: Kind, ledger: Ledger, index: int, causal: bool) -> None:
        replacement = self.sublayers[kind].replacement
        made = None if replacement is None else replacement(self.layer, causal, index)
        if made is not None and not isinstance(made, Mean):
            raise UnsupportedModelError(
                f"In place of the {kind} of layer {index} of {type(self.layer).__name__} only nothing or its mean can "
                f"stand, since {self.why}. Use replace='nothing' or replace='mean'."
            )
        silent = self.modules.silent[kind]
        for position, entry in enumerate(silent):
            vector: Callable[[], Tensor] | None = None
            if made is not None and position == 0:
                vector = made.vector
            seen = partial(_leave_empty, index) if kind == "attention" else None
            ledger.set_forward(self.layer.get_submodule(entry.path), Zeros(entry, vector, seen))

    def _check(self, index: int) -> None:
        for kind in KINDS:
            plan = self.sublayers[kind]
            if plan.rows or plan.staying or plan.prepares:
                raise UnsupportedModelError(
                    f"Tokens cannot be left out of the {kind} of layer {index}: {self.why}. LayerDrop, EarlyExit and "
                    "TempScale apply to this model; see slimformer.support(model)."
                )

    def _impossible(self, what: str, index: int, reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"Cannot drop {what} of layer {index}, {type(self.layer).__name__}: {reason}. The model was left as it was."
        )


@dataclass(frozen=True)
class _Bypass:
    """Stands in for the `forward` of a dropped layer: its input, as the layer would return it."""

    returns: int
    name: str
    seen: Callable[[dict[str, Any]], None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.seen(kwargs)
        hidden = args[0] if args else kwargs[self.name]
        return (hidden, *[None] * (self.returns - 1)) if self.returns else hidden


def _leave_empty(slot: int, kwargs: dict[str, Any]) -> None:
    cache = layer_cache(kwargs)
    held = None if cache is None or slot >= len(cache.layers) else cache.layers[slot]
    # Slots of linear attentions know no tokens that could be taken back.
    if held is None or isinstance(held, DynamicLayer):
        leave_slot_empty(cache, slot)

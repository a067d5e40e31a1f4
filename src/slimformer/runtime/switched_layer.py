"""A layer whose arithmetic is not known: whole sublayers and whole layers can be switched off, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from slimformer.cache.counted_slot import Count
from slimformer.cache.slots import CACHE_NAMES, Content
from slimformer.calls.depths import stand_in
from slimformer.changes.ledger import Ledger, has_own
from slimformer.decisions.policy import Decision
from slimformer.decisions.replacements import Mean
from slimformer.decisions.selection import RowSelector
from slimformer.errors import UnsupportedModelError
from slimformer.model.anatomy import Anatomy, positional_names
from slimformer.model.layer_parts import KINDS, Kind
from slimformer.runtime.sublayer_modules import SublayerModules, Zeros


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
        depth: Which of several calls of the layer in one forward pass this is; None where there is one.
    """

    layer: nn.Module
    modules: SublayerModules
    why: str = ""
    sublayers: dict[Kind, Decision] = field(default_factory=lambda: {kind: Decision() for kind in KINDS})
    shortens: bool = False
    depth: int | None = None

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
        if "attention" not in dropped or (len(dropped) == 1 and self._caching() is None):
            return "keys"
        return "count"

    def _caching(self) -> str | None:
        """The path of the module that writes to the cache, if it is silent where the attention is dropped."""
        for entry in self.modules.silent.get("attention", ()):
            names = positional_names(self.layer.get_submodule(entry.path))
            if any(name in CACHE_NAMES for name in names):
                return entry.path
        return None

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
        if dropped and has_own(self.layer, "forward"):
            raise self._impossible(
                "part", index, "its forward was replaced by somebody else's, whose parts are not known"
            )
        bare = all(self.sublayers[kind].replacement is None for kind in KINDS)
        if len(dropped) == len(KINDS) and bare:
            if "block" in self.modules.reasons:
                raise self._impossible("the whole", index, self.modules.reasons["block"])
            bypass = _Bypass(self.modules.returns, Count(slot, positional_names(self.layer)))
            stand_in(ledger, self.layer, bypass, self.depth)
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
            module = self.layer.get_submodule(entry.path)
            # Once, where a layer has several mixers.
            counts = kind == "attention" and entry.path == self._caching()
            seen = Count(index, positional_names(module)) if counts else None
            stand_in(ledger, module, Zeros(entry, vector, seen), self.depth)

    def _check(self, index: int) -> None:
        for kind in KINDS:
            plan = self.sublayers[kind]
            if self.depth is not None and (plan.replacement is not None or plan.changes):
                raise UnsupportedModelError(
                    f"The {kind} of layer {index} of {type(self.layer).__name__} can be left out, but nothing with "
                    f"weights can stand in its place and none of its weights can be changed: {self.why}. Use "
                    "LayerDrop(replace='nothing'), or EarlyExit without a head."
                )
            if plan.rows or plan.not_evicted:
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
    count: Count

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count(args, kwargs)
        hidden = args[0] if args else kwargs[self.count.names[0]]
        return (hidden, *[None] * (self.returns - 1)) if self.returns else hidden

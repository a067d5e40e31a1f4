"""What may be left out, one part at a time, and what such parts stand on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from slimformer.calibration.drops.search import may_drop, sublayers_of
from slimformer.calibration.drops.similarity import Unit as Kind
from slimformer.decisions.replacements import Replace
from slimformer.errors import PlanError, UnsupportedModelError
from slimformer.examination.tiers import Support
from slimformer.methods.layer_drop import LayerDrop
from slimformer.model.layer_parts import KINDS
from slimformer.patching import patched

Unit = tuple[Kind, int]
_SHORT = {"attention": "A", "mlp": "M", "block": "B"}


@dataclass(frozen=True)
class Base:
    """What sublayers are dropped from: the whole model, or one of which something else goes too.

    Of several, one is taken.

    Attributes:
        name: In words.
        methods: What makes it.
        cost: Of one run with it and nothing dropped: seconds, or bytes.
        losses: How far it is from dense, of every source.
        left: The part of a unit's cost that there still is to save; 1 where it is not named.
        whole: Units that cannot be dropped from it.
        replace: What dropped sublayers leave behind.
        taps: How many inputs the filter of an attention reads.
        single: What each unit loses when it alone goes and leaves that behind; empty where nothing is left.
    """

    name: str
    methods: tuple[Any, ...]
    cost: float
    losses: Mapping[str, float] = field(default_factory=dict)
    left: Mapping[Unit, float] = field(default_factory=dict)
    whole: frozenset[Unit] = frozenset()
    replace: Replace = "nothing"
    taps: int = 1
    single: Mapping[Unit, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """A base and what is dropped from it.

    Attributes:
        base: The base's name.
        units: In order.
    """

    base: str
    units: tuple[Unit, ...]

    @property
    def words(self) -> str:
        """For tables.

        Example:
            >>> Proposal("", (("attention", 3), ("mlp", 3), ("mlp", 7))).words
            'MLPs 7, blocks 3'
        """
        gone = {kind: [layer for k, layer in self.units if k == kind] for kind in _SHORT}
        both = sorted({*gone["block"], *(set(gone["attention"]) & set(gone["mlp"]))})
        parts = [self.base] if self.base else []
        for name, layers in (
            ("attentions", set(gone["attention"]) - set(both)),
            ("MLPs", set(gone["mlp"]) - set(both)),
            ("blocks", set(both)),
        ):
            if layers:
                parts.append(f"{name} {' '.join(map(str, sorted(layers)))}")
        return ", ".join(sorted(parts, key=lambda part: part != self.base)) or "nothing dropped"


def drop_of(
    units: Iterable[Unit],
    replace: Replace = "nothing",
    taps: int = 1,
    weights: Mapping[str, Tensor] | None = None,
) -> LayerDrop:
    """The method that drops them; one that drops nothing where there are none.

    Args:
        units: What goes.
        replace: What each leaves behind.
        taps: How many inputs the filter of an attention reads.
        weights: Of what is left behind.

    Example:
        >>> drop_of([("attention", 3), ("mlp", 3), ("mlp", 5)])
        LayerDrop(attention=(), mlp=(5,), block=(3,), replace='nothing', taps=1)
    """
    sublayers = sorted({sublayer for unit in units for sublayer in sublayers_of(*unit)}, key=lambda s: s[1])
    layers = {kind: [layer for k, layer in sublayers if k == kind] for kind in KINDS}
    both = [layer for layer in layers["attention"] if layer in layers["mlp"]]
    alone = {kind: [layer for layer in of if layer not in both] for kind, of in layers.items()}
    return LayerDrop(
        alone["attention"], alone["mlp"], both, replace=replace, taps=taps, weights=weights or {}
    )


def methods_of(base: Base, units: Sequence[Unit]) -> tuple[Any, ...]:
    """What a plan of them holds."""
    return (*base.methods, drop_of(units)) if units or not base.methods else base.methods


def droppable(model: Any, support: Support) -> list[Unit]:
    """Every attention and MLP that can go by itself, or the layer where only both can."""
    found: list[Unit] = []
    for layer in range(len(support.anatomy.layers)):
        alone = [(kind, layer) for kind in KINDS if _goes(model, support, (kind, layer))]
        found += alone or ([("block", layer)] if _goes(model, support, ("block", layer)) else [])
    return found


def allowed(support: Support, units: Sequence[Unit]) -> bool:
    """Whether what stays still counts positions and holds a cache."""
    return may_drop(support.anatomy, [sublayer for unit in units for sublayer in sublayers_of(*unit)])


def _goes(model: Any, support: Support, unit: Unit) -> bool:
    if support.tier == "rows":
        return may_drop(support.anatomy, sublayers_of(*unit))
    try:
        with patched(model, drop_of([unit])):
            return True
    except (PlanError, UnsupportedModelError):
        return False

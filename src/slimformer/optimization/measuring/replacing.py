"""What sublayers may leave behind in place of nothing, as further bases: their means, and filters of their inputs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from slimformer.decisions.replacements import Replace
from slimformer.errors import DataError, PlanError, UnsupportedModelError
from slimformer.examination.tiers import Support
from slimformer.optimization.measuring.costs import Costs, Meter
from slimformer.optimization.measuring.losses import Losses
from slimformer.optimization.units import Base, Unit

_logger = logging.getLogger("slimformer")
# On a CPU there is time to solve only for filters of few inputs.
_KINDS: Mapping[str, Sequence[tuple[str, Replace, int]]] = {
    "cuda": (
        ("filters of 4 taps left", "filter", 4),
        ("filters left", "filter", 1),
        ("means left", "mean", 1),
    ),
    "cpu": (("filters left", "filter", 1), ("means left", "mean", 1)),
}
# In fewer minutes than these, by device, there is no time to fit; and what saves less than this part of what leaving
# nothing saves is not worth its place.
_MINUTES, _WORTH = {"cuda": 5.0, "cpu": 8.0}, 0.15


def replaces(support: Support, device: str, minutes: float) -> bool:
    """Whether replacements are fitted at all."""
    rows = support.tier == "rows" and not support.anatomy.repeats
    return rows and minutes >= _MINUTES.get(device, _MINUTES["cpu"])


def replacing_bases(
    losses: Losses,
    meter: Meter,
    costs: Costs,
    units: Sequence[Unit],
    allowance: float,
    advance: Callable[[int], None],
    kept: Mapping[str, Any],
) -> Iterator[Base]:
    """Each kind of replacement with what it saves and what each unit then loses alone, where any saves enough.

    Args:
        losses: Of the mixture, with rows to fit on.
        meter: Measures costs.
        costs: Of the whole model, with nothing left behind.
        units: What may be dropped.
        allowance: Seconds for the timing of each kind.
        advance: Called after each unit.
        kept: From partial results: what `to_keep` gave, by name.
    """
    device = losses.model.device.type
    for name, replace, taps in _KINDS.get(device, _KINDS["cpu"]):
        if name in kept:
            yield _kept(name, replace, taps, costs, units, kept[name])
            continue
        left = dict.fromkeys(units, 1.0)
        single: Mapping[Unit, Mapping[str, float]] = {}
        try:
            # A mean is one addition.
            if replace == "filter":
                found = meter.costs(units, allowance, replace, taps)
                left = {unit: _part(found, costs, unit) for unit in units}
            free = [unit for unit in units if left[unit] > _WORTH]
            if free:
                single = losses.alone(free, {}, advance, replace, taps)
        except (DataError, PlanError, UnsupportedModelError) as error:
            _logger.info("Nothing is tried with %s: %s", name, error)
            continue
        yield _base(name, replace, taps, costs, units, left, single)


def to_keep(base: Base) -> dict[str, Any]:
    """What partial results hold of one."""
    return {
        "left": [[kind, layer, part] for (kind, layer), part in base.left.items()],
        "single": [[kind, layer, dict(of)] for (kind, layer), of in base.single.items()],
    }


def _kept(
    name: str, replace: Replace, taps: int, costs: Costs, units: Sequence[Unit], found: Mapping[str, Any]
) -> Base:
    left = {(kind, layer): part for kind, layer, part in found["left"]}
    single = {(kind, layer): of for kind, layer, of in found["single"]}
    return _base(name, replace, taps, costs, units, left, single)


def _base(
    name: str,
    replace: Replace,
    taps: int,
    costs: Costs,
    units: Sequence[Unit],
    left: Mapping[Unit, float],
    single: Mapping[Unit, Mapping[str, float]],
) -> Base:
    whole = frozenset(unit for unit in units if unit not in single)
    return Base(name, (), costs.plain, left=left, whole=whole, replace=replace, taps=taps, single=single)


def _part(found: Costs, costs: Costs, unit: Unit) -> float:
    """The part of what leaving nothing saves, on a machine that may be slower by now."""
    if costs.saved[unit] <= 0:
        return 0.0
    return min(found.saved[unit] * costs.dense / found.dense / costs.saved[unit], 1.0)

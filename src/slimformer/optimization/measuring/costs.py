"""What every unit costs on this machine in the phase asked for: seconds measured in turns with dense, or bytes."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slimformer.calibration.drops.search import sublayers_of
from slimformer.decisions.replacements import Replace, taps_of
from slimformer.examination.tiers import Support
from slimformer.methods.layer_drop import LayerDrop
from slimformer.optimization.goals import Conditions, Prompts, Workload, read_bytes, seconds, weight_bytes
from slimformer.optimization.units import Base, Unit, allowed, drop_of
from slimformer.patching import patched

_FEWEST, _MOST = 2, 9


@dataclass(frozen=True)
class Costs:
    """Seconds of a run, or bytes.

    Attributes:
        dense: Of the unpatched model.
        plain: Of the model patched with nothing dropped, on which the kernels that lose nothing run.
        saved: What leaving out each unit saves.
    """

    dense: float
    plain: float
    saved: Mapping[Unit, float]

    def of(self, base: Base, units: Sequence[Unit]) -> float:
        """Of a base without some units."""
        return base.cost - sum(self.saved_by(base, unit) for unit in units)

    def saved_by(self, base: Base, unit: Unit) -> float:
        """What a unit saves where something else goes too."""
        return self.saved[unit] * base.left.get(unit, 1.0)

    def to_dict(self) -> dict[str, Any]:
        """As a plan's provenance holds it."""
        saved = [
            {"kind": kind, "layer": layer, "saved": value} for (kind, layer), value in self.saved.items()
        ]
        return {"dense": self.dense, "plain": self.plain, "units": saved}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Costs:
        """What `to_dict` gave."""
        saved = {(entry["kind"], entry["layer"]): entry["saved"] for entry in found["units"]}
        return cls(found["dense"], found["plain"], saved)


@dataclass
class Meter:
    """Measures runs of a model.

    Attributes:
        model: Unpatched.
        support: What is known of its layers.
        workload: What is run.
        conditions: Lengths and batch.
        gain: How many times as fast as dense the patch alone is; None before it was measured.
        dense_bytes: For memory: weights, the cache behind the prompts, and each of its slots.
    """

    model: Any
    support: Support
    workload: Workload
    conditions: Conditions
    gain: float | None = None
    dense_bytes: tuple[int, int, list[int]] = field(default=(0, 0, []), init=False)
    _warm: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.counts_bytes and isinstance(self.workload, Prompts):
            self.dense_bytes = weight_bytes(self.model), *read_bytes(self.model, self.workload)

    @property
    def counts_bytes(self) -> bool:
        """Whether bytes are counted, and no time measured."""
        return self.conditions.goal == "memory"

    def costs(
        self, units: Sequence[Unit], allowance: float, replace: Replace = "nothing", taps: int = 1
    ) -> Costs:
        """Of every unit; layers of the same shape are measured together.

        Args:
            units: What may be left out.
            allowance: About how many seconds this may take.
            replace: What each leaves behind.
            taps: How many inputs the filter of an attention reads.
        """
        if self.counts_bytes:
            whole = float(sum(self.dense_bytes[:2]))
            left = {
                unit: sum(t.nbytes for t in self._unfitted([unit], replace, taps).values()) for unit in units
            }
            return Costs(whole, whole, {unit: float(self._bytes_of(unit) - left[unit]) for unit in units})
        alike: dict[tuple[Any, ...], list[Unit]] = {}
        for unit in units:
            alike.setdefault((unit[0], *self._shape(unit[1])), []).append(unit)
        gone = [self._together(of) for of in alike.values()]
        variants: list[tuple[Any, ...]] = [(), (LayerDrop(),)]
        variants += [(drop_of(of, replace, taps, self._unfitted(of, replace, taps)),) for of in gone]
        times = self.in_turns(variants, allowance)
        saved: dict[Unit, float] = {}
        for of, out, own in zip(alike.values(), gone, times[2:], strict=True):
            # The fastest of each: whatever else a machine does can only add to a run.
            saved |= dict.fromkeys(of, max(min(times[1]) - min(own), 0.0) / len(out))
        return Costs(min(times[0]), min(times[1]), {unit: saved[unit] for unit in units})

    def in_turns(self, variants: Sequence[tuple[Any, ...]], allowance: float) -> list[list[float]]:
        """Seconds of every variant, round by round, so that whatever slows the machine down meets all of them.

        Args:
            variants: Methods; none for the unpatched model.
            allowance: Seconds in all, after which no further round begins; two are always measured.
        """
        found: list[list[float]] = [[] for _ in variants]
        begun, rounds, device = time.monotonic(), 0, self.support.anatomy.stack.device
        # The first warms up memory, kernels and clocks; a CPU has nothing to warm up the next time.
        warming = 1 if device.type != "cpu" or not self._warm else 0
        self._warm = True
        fewest, most = _FEWEST + warming, _MOST + warming
        while rounds < fewest or (rounds < most and _fits(begun, rounds, allowance)):
            for methods, times in zip(variants, found, strict=True):
                with patched(self.model, *methods) if methods else contextlib.nullcontext():
                    if methods and device.type != "cpu":
                        # Kernels and graphs of a patch are made at its first call.
                        self.workload.run(self.model)
                    times.append(seconds(self.model, self.workload, device))
            rounds += 1
        return [times[warming:] for times in found]

    def compared(self, methods: tuple[Any, ...], allowance: float) -> tuple[float, float]:
        """What dense and a plan cost, measured in turns."""
        if self.counts_bytes:
            return float(sum(self.dense_bytes[:2])), self._bytes_with(methods)
        dense, slim = self.in_turns([(), methods], allowance)
        return min(dense), min(slim)

    def estimated(self, methods: tuple[Any, ...], allowance: float) -> tuple[float, float]:
        """The same while it is searched: measured in turns with the patch alone, where it is known what that gains.

        Without padding the patch alone may be several times as fast as dense, and so is the measuring.
        """
        if self.counts_bytes or self.gain is None:
            return self.compared(methods, allowance)
        plain, slim = self.in_turns([(LayerDrop(),), methods], allowance)
        return min(plain) * self.gain, min(slim)

    def base(self, costs: Costs, name: str, methods: tuple[Any, ...], touched: Sequence[Unit], allowance: float,
             whole: frozenset[Unit] = frozenset()) -> Base:  # fmt: skip
        """A base, and what is left to save of the units that it touches, as far as what they cost has shrunk.

        Args:
            costs: Of the model without it.
            name: In words.
            methods: What makes it.
            touched: Units that cost less with it.
            allowance: Seconds for measuring.
            whole: Units that cannot go from it.
        """
        dense, slim = self.estimated(methods, allowance)
        cost = slim * costs.dense / dense
        touched_cost = sum(costs.saved[unit] for unit in touched)
        part = 1 - (costs.plain - cost) / touched_cost if touched_cost > 0 else 1.0
        return Base(name, methods, cost, left=dict.fromkeys(touched, min(max(part, 0.0), 1.0)), whole=whole)

    def _unfitted(self, units: Sequence[Unit], replace: Replace, taps: int) -> dict[str, Tensor]:
        """Weights of what units leave behind, which cost what fitted ones do."""
        if replace == "nothing":
            return {}
        hidden, like = (
            self.support.anatomy.stack.config.hidden_size,
            next(self.support.anatomy.stack.parameters()),
        )
        found = {}
        for kind, layer in (sublayer for unit in units for sublayer in sublayers_of(*unit)):
            found[f"{kind}.{layer}.bias"] = torch.zeros(hidden, dtype=like.dtype)
            if replace == "filter":
                read = taps_of(kind, taps) * hidden
                found[f"{kind}.{layer}.weight"] = torch.zeros(hidden, read, dtype=like.dtype)
        return found

    def _bytes_of(self, unit: Unit) -> int:
        kinds = ("attention", "mlp") if unit[0] == "block" else (unit[0],)
        slots = self.dense_bytes[2]
        cached = slots[unit[1]] if "attention" in kinds and unit[1] < len(slots) else 0
        return cached + sum(_bytes(module) for kind in kinds for module in self._modules(kind, unit[1]))

    def _bytes_with(self, methods: tuple[Any, ...]) -> float:
        """What an export without the dropped weights and the cache hold."""
        if not isinstance(self.workload, Prompts):
            return math.inf
        dropped = {s for m in methods if isinstance(m, LayerDrop) for kind in ("attention", "mlp")
                   for s in ((kind, layer) for layer in m.dropped(kind))}  # fmt: skip
        weights = sum(_bytes(module) for kind, layer in dropped for module in self._modules(kind, layer))
        weights -= sum(t.nbytes for m in methods if isinstance(m, LayerDrop) for t in m.weights.values())
        with patched(self.model, *methods):
            cache, _ = read_bytes(self.model, self.workload)
        return float(self.dense_bytes[0] - weights + cache)

    def _modules(self, kind: str, layer: int) -> list[nn.Module]:
        found = self.support.anatomy.layers[layer]
        if self.support.tier == "rows":
            parts = self.support.anatomy.structure.parts("attention" if kind == "attention" else "mlp")
            return [found.get_submodule(name) for name in sorted(parts.children_of(found))]
        silent = self.support.modules[layer].silent.get("attention" if kind == "attention" else "mlp", ())
        return [found.get_submodule(entry.path) for entry in silent]

    def _shape(self, layer: int) -> tuple[Any, ...]:
        anatomy = self.support.anatomy
        types = anatomy.layer_types
        shapes = tuple(tuple(parameter.shape) for parameter in anatomy.layers[layer].parameters())
        return types[layer] if layer < len(types) else "", shapes

    def _together(self, units: Sequence[Unit]) -> list[Unit]:
        """As many of them as can go at once: the last ones, since positions are counted at the first."""
        for first in range(len(units)):
            if allowed(self.support, units[first:]):
                return list(units[first:])
        return []


def _fits(begun: float, rounds: int, allowance: float) -> bool:
    used = time.monotonic() - begun
    return used * (rounds + 1) / rounds <= allowance


def _bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())

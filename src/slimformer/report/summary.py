"""What a report reads out of a plan, checked: a plan's file may come from anywhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from slimformer.errors import PlanError
from slimformer.methods.early_exit import EarlyExit
from slimformer.plans.plan import Plan

NAMES = {"attention": "attention", "mlp": "MLP", "block": "block"}
_MOST_LAYERS = 10_000
_DIVERGENCE = "Divergence from dense"


class Step(NamedTuple):
    """One removal.

    Attributes:
        kind: `attention`, `mlp` or `block`.
        layer: Index of the layer.
        divergence: Distance to the dense model after it, where it was measured; of several sources the largest.
        sources: The same of every source, where there are several.
    """

    kind: str
    layer: int
    divergence: float | None
    sources: Mapping[str, float] = {}

    @property
    def name(self) -> str:
        """The sublayer in words."""
        return f"{NAMES[self.kind]} {self.layer}"


class Row(NamedTuple):
    """One measured figure, dense beside slim, ready to print."""

    name: str
    dense: str
    slim: str
    change: str


@dataclass(frozen=True)
class Summary:
    """A plan as the tables and charts need it; what is absent or of the wrong shape is empty.

    Attributes:
        layers: How many layers the model has, as far as the plan tells.
        dropped: Layers of each kind that do not run, sorted.
        steps: The removals.
        ordered: Whether their order was recorded; else they come in the order of the plan's lists.
        similarity: One value per layer of each kind, or nothing for a kind that was not measured.
        divergence_name: What the steps' divergence is.
        replacement: What stands in for dropped sublayers.
    """

    layers: int
    dropped: Mapping[str, tuple[int, ...]]
    steps: tuple[Step, ...]
    ordered: bool
    similarity: Mapping[str, tuple[float, ...]]
    divergence_name: str
    replacement: str

    @classmethod
    def of(cls, plan: Plan) -> Summary:
        """Read a plan.

        Raises:
            PlanError: If it names a layer that no model has: drawing that many would take all memory.

        Example:
            >>> from slimformer import LayerDrop
            >>> Summary.of(Plan([LayerDrop(attention=[3], block=[2])])).dropped["attention"]
            (2, 3)
        """
        listed = [
            Step(kind, layer, None)
            for method in plan.drops
            for kind in ("attention", "mlp", "block")
            for layer in getattr(method, kind)
        ]
        said = plan.fingerprint.get("layers")
        if plan.exit is not None:
            end = min(said, _MOST_LAYERS) if isinstance(said, int) else plan.exit + 1
            listed += [Step("block", layer, None) for layer in range(plan.exit, end)]
        dropped = {
            kind: tuple(sorted({step.layer for step in listed if step.kind in (kind, "block")}))
            for kind in ("attention", "mlp")
        }
        measured = plan.provenance.get("similarity")
        similarity = {
            kind: _finite(measured.get(kind) if isinstance(measured, Mapping) else None) for kind in NAMES
        }
        layers = max(
            said if isinstance(said, int) else 1,
            *(len(values) for values in similarity.values()),
            *(step.layer + 1 for step in listed),
        )
        if layers > _MOST_LAYERS:
            raise PlanError(f"The plan speaks of {layers} layers; a report shows up to {_MOST_LAYERS}.")
        recorded = _steps(plan.provenance.get("steps"))
        # A plan changed by hand no longer tells in which order its sublayers went.
        same = sorted((s.kind, s.layer) for s in recorded) == sorted((s.kind, s.layer) for s in listed)
        name = plan.provenance.get("divergence_name")
        return cls(
            layers,
            dropped,
            recorded if same else tuple(listed),
            same,
            similarity,
            name if isinstance(name, str) and name else _DIVERGENCE,
            _replacement(plan),
        )

    def divergences(self) -> dict[str, list[float | None]]:
        """Columns of what was measured after each removal: one, or one of every source."""
        sources = dict.fromkeys(name for step in self.steps for name in step.sources)
        if sources:
            return {name: [step.sources.get(name) for step in self.steps] for name in sources}
        found = [step.divergence for step in self.steps]
        return {"": found} if any(value is not None for value in found) else {}

    @property
    def count(self) -> int:
        """How many sublayers do not run."""
        return sum(len(layers) for layers in self.dropped.values())

    def similarity_of(self, step: Step) -> float | None:
        """The similarity measured for what a step removed."""
        values = self.similarity[step.kind]
        return values[step.layer] if step.layer < len(values) else None

    def order(self) -> dict[tuple[str, int], int]:
        """Which removal, from 1 on, took each sublayer."""
        return {
            (kind, step.layer): number
            for number, step in enumerate(self.steps, start=1)
            for kind in (("attention", "mlp") if step.kind == "block" else (step.kind,))
        }


def comparison(measured: Mapping[str, Any]) -> list[Row]:
    """Rows for what was measured, as `Plan.measured` holds it: `quality`, `task`, `tasks`, `speed`, any may be absent.

    Example:
        >>> comparison({"quality": {"perplexity_dense": 20.0, "perplexity_slim": 21.0}})
        [Row(name='Perplexity', dense='20.00', slim='21.00', change='+5.0%')]
    """
    return [
        *_quality_rows(_mapping(measured.get("quality"))),
        *_task_rows(_mapping(measured.get("task"))),
        *_task_rows(_mapping(measured.get("tasks"))),
        *_speed_rows(_mapping(measured.get("speed"))),
    ]


def _quality_rows(quality: Mapping[str, Any]) -> list[Row]:
    rows = []
    dense, slim = _number(quality.get("perplexity_dense")), _number(quality.get("perplexity_slim"))
    if dense is not None and slim is not None:
        rows.append(Row("Perplexity", f"{dense:.2f}", f"{slim:.2f}", _percent(slim, dense)))
    for name, key, same, written in (
        ("KL to dense, nats per token", "divergence", "0", figure),
        ("Same next token as dense", "agreement", "100%", "{:.1%}".format),
        ("Cosine to the dense embedding", "embedding_cosine", "1", "{:.4f}".format),
    ):
        value = _number(quality.get(key))
        if value is not None:
            rows.append(Row(name, same, written(value), ""))
    return rows


def _task_rows(task: Mapping[str, Any]) -> list[Row]:
    dense, slim = _mapping(task.get("dense")), _mapping(task.get("slim"))
    rows = []
    for name in slim:
        before, after = _number(dense.get(name)), _number(slim.get(name))
        if after is not None:
            words = ("", "") if before is None else (f"{before:.4g}", _percent(after, before))
            rows.append(Row(str(name), words[0], f"{after:.4g}", words[1]))
    return rows


def _speed_rows(speed: Mapping[str, Any]) -> list[Row]:
    dense, slim = _mapping(speed.get("dense")), _mapping(speed.get("slim"))
    rows = []
    # What makes embeddings reads once, and that is all.
    reading = "Forward" if speed.get("decode_speedup", 0) is None else "Prefill"
    for name, key in ((reading, "prefill_seconds"), ("Decode, per token", "decode_seconds_per_token")):
        before, after = _number(dense.get(key)), _number(slim.get(key))
        if before and after:
            rows.append(Row(name, seconds(before), seconds(after), f"{before / after:.2f}× as fast"))
    for name, key in (("KV cache", "cache_bytes"), ("Peak memory", "peak_bytes")):
        before, after = _number(dense.get(key)), _number(slim.get(key))
        if before and after is not None:
            rows.append(Row(name, byte_size(before), byte_size(after), _percent(after, before)))
    return rows


def figure(value: float) -> str:
    """A divergence with four decimals, or in powers of ten where these would show none of it.

    Example:
        >>> figure(0.0312), figure(0.0), figure(0.00001234)
        ('0.0312', '0.0000', '1.2e-05')
    """
    return f"{value:.1e}" if 0 < abs(value) < 0.001 else f"{value:.4f}"


def seconds(value: float) -> str:
    """A duration with a unit that suits it.

    Example:
        >>> seconds(0.0123), seconds(2.5)
        ('12.3 ms', '2.50 s')
    """
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def byte_size(value: float) -> str:
    """A size in binary units.

    Example:
        >>> byte_size(3 * 2**20), byte_size(100)
        ('3.0 MiB', '100 B')
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.0f} B"


def _percent(after: float, before: float) -> str:
    if not (math.isfinite(after) and math.isfinite(before)) or before == 0:
        return ""
    change = 100 * (after / before - 1)
    return "±0%" if abs(change) < 0.05 else f"{change:+.1f}%".replace("-", "−")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _finite(values: Any) -> tuple[float, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return ()
    numbers = [_number(value) for value in values]
    if any(number is None or not math.isfinite(number) for number in numbers):
        return ()
    return tuple(number for number in numbers if number is not None)


def _steps(found: Any) -> tuple[Step, ...]:
    steps = []
    for entry in found if isinstance(found, Sequence) and not isinstance(found, str) else ():
        kind, layer = _mapping(entry).get("kind"), _mapping(entry).get("layer")
        if kind not in NAMES or not isinstance(layer, int):
            return ()
        value = _finite_number(_mapping(entry).get("divergence"))
        of = {
            str(name): _finite_number(one) for name, one in _mapping(_mapping(entry).get("sources")).items()
        }
        steps.append(Step(kind, layer, value, {name: one for name, one in of.items() if one is not None}))
    return tuple(steps)


def _finite_number(value: Any) -> float | None:
    found = _number(value)
    return found if found is not None and math.isfinite(found) else None


def _replacement(plan: Plan) -> str:
    words = {"mean": "the mean of what each added"}
    parts = []
    for method in plan.drops:
        kind = str(getattr(method, "replace", "nothing"))
        words["filter"] = f"a causal filter of {getattr(method, 'taps', '?')} taps"
        parts.append(words.get(kind, kind))
    exits = [method for method in plan.methods if isinstance(method, EarlyExit)]
    parts += ["a linear head" if method.weights else "nothing" for method in exits]
    return ", ".join(dict.fromkeys(parts))

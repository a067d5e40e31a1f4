"""Check every candidate, then time those that passed beside their baseline."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.frame.registry import Settings
from benchmarks.frame.results import Measurement, Parameters, Timing, reason
from benchmarks.frame.timing import Candidate, Effort, Regime, interleaved

Medians = Mapping[str, float]


class Unsupported(Exception):
    """A candidate does not take this input; says why."""


@dataclass(frozen=True)
class Case:
    """A candidate with its check.

    Attributes:
        run: One call, as it is timed.
        check: Runs it once on fresh data and returns the relative error against the reference.
        tolerance: Largest error that passes.
        prepare: Done before every timed call, outside the time.
        yardstick: An earlier case, the unpatched model, whose own error is allowed too, with a quarter more: what
            rounding does to it under the same conditions cannot be asked of the patched one.
    """

    run: Callable[[], object]
    check: Callable[[], float]
    tolerance: float
    prepare: Callable[[], object] | None = None
    yardstick: str | None = None


def against(
    expected: Tensor | None,
    call: Callable[[], Tensor],
    tolerance: float = math.inf,
    *,
    prepare: Callable[[], object] | None = None,
    yardstick: str | None = None,
    part: Callable[[Tensor], Tensor] = lambda output: output,
) -> Case:
    """A call whose output, or a `part` of it, is compared with a tensor; with none where there is nothing to expect."""

    def check() -> float:
        if prepare is not None:
            prepare()
        output = part(call())
        return 0.0 if expected is None else relative_error(output, expected)

    return Case(call, check, tolerance, prepare, yardstick)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``‖got − expected‖ / ‖expected‖``, as a float that is NaN where anything is."""
    difference = (got.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp_min(1e-30))


def compare(
    settings: Settings,
    parameters: Parameters,
    cases: Mapping[str, Case],
    *,
    regime: Regime | Sequence[Regime],
    baseline: str,
    ideal: Callable[[str, Medians], float | None] | None = None,
    values: Callable[[Medians], Mapping[str, Mapping[str, float]]] | None = None,
    effort: Effort | None = None,
) -> Iterator[Measurement]:
    """Measure the cases at one point.

    Args:
        settings: Of the run.
        parameters: The point, without the regime.
        cases: By name, in the order of the report.
        regime: How calls are launched and timed; with several, once in each.
        baseline: The case that ratios refer to.
        ideal: Milliseconds that a case would take at best, given all medians; None where there is no such figure.
        values: Further figures per case, given all medians.
        effort: How long to measure.
    """
    regimes: Sequence[Regime] = (regime,) if isinstance(regime, str) else regime
    for one in regimes:
        point = {**parameters, "regime": one}
        found: dict[str, Measurement] = {}
        for name, case in cases.items():
            yardstick = found.get(case.yardstick or "")
            own = 0.0 if yardstick is None or yardstick.error is None else yardstick.error
            found[name] = _checked(point, name, case, max(case.tolerance, 1.25 * own))
        passed = {
            n: Candidate(case.run, case.prepare) for n, case in cases.items() if found[n].status == "ok"
        }
        times = _times(settings, point, passed, found, one, effort or Effort())
        medians = {name: timing.p50 for name, timing in times.items()}
        extra = values(medians) if values is not None else {}
        for name, measurement in found.items():
            if name not in times:
                yield measurement
                continue
            median = medians[name]
            best = ideal(name, medians) if ideal is not None else None
            yield dataclasses.replace(
                measurement,
                milliseconds=times[name],
                baseline_ratio=median / medians[baseline] if baseline in medians else None,
                ideal_ratio=median / best if best else None,
                values=extra.get(name, {}),
            )


def _checked(point: Parameters, name: str, case: Case, tolerance: float) -> Measurement:
    try:
        error = case.check()
    except Unsupported as limit:
        return Measurement(point, name, status="unsupported", note=str(limit))
    except Exception as failure:
        release()
        return Measurement(point, name, status="failed", note=reason(failure))
    # Written so that NaN does not pass.
    if not error <= tolerance:
        return Measurement(
            point,
            name,
            status="wrong",
            error=error,
            note=f"relative error {error:.3g}, allowed {tolerance:.3g}",
        )
    return Measurement(point, name, error=error)


def _times(
    settings: Settings,
    point: Parameters,
    passed: dict[str, Candidate],
    found: dict[str, Measurement],
    regime: Regime,
    effort: Effort,
) -> dict[str, Timing]:
    """Times of all; where the common run fails, each alone beside nobody, so that one failure costs one row."""
    if settings.smoke:
        effort = Effort(milliseconds=0.0, least=2, most=2)
    try:
        return interleaved(passed, settings.device, regime=regime, effort=effort)
    except Exception:
        release()
    times = {}
    for name, candidate in passed.items():
        try:
            times.update(interleaved({name: candidate}, settings.device, regime=regime, effort=effort))
        except Exception as failure:
            release()
            found[name] = Measurement(
                point, name, status="failed", error=found[name].error, note=reason(failure)
            )
    return times


def release() -> None:
    """Give the memory of what is over back before the next candidate or benchmark starts."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

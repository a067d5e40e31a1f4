"""What a benchmark hands back, and the JSON files it is kept in."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# A point of a benchmark: shape, tokens, keep ratio, regime.
Parameters = Mapping[str, str | int | float | bool]

FORMAT = 1
STATES = ("ok", "wrong", "failed", "unsupported")
_DOCUMENT = {
    "format": int,
    "benchmark": str,
    "device": str,
    "versions": dict,
    "date": str,
    "smoke": bool,
    "complete": bool,
    "seconds": float,
    "measurements": list,
}
_PATH = re.compile(r"(?<![\w.])/(?:[\w.@+-]+/)+[\w.@+-]*")


@dataclass(frozen=True)
class Timing:
    """Percentiles over the rounds of one interleaved run, in milliseconds per call."""

    p20: float
    p50: float
    p80: float
    runs: int


@dataclass(frozen=True)
class Measurement:
    """One candidate at one point.

    Attributes:
        parameters: What was measured: shape, tokens, keep ratio, regime.
        candidate: Who was measured.
        status: "ok"; "wrong" where the output was not the reference's, "failed" where it raised, "unsupported"
            where it does not take this input. Only "ok" carries a time.
        milliseconds: The time, or None.
        baseline_ratio: Median time over the baseline's: below 1 is faster.
        ideal_ratio: Median time over what the work would take at the hardware's or the dense model's own rate.
        error: Relative error against the reference, found before any time was taken; None where there is none.
        values: Further figures: bytes, perplexity, time saved.
        note: Why there is no time.
    """

    parameters: Parameters
    candidate: str
    status: str = "ok"
    milliseconds: Timing | None = None
    baseline_ratio: float | None = None
    ideal_ratio: float | None = None
    error: float | None = None
    values: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    def line(self) -> str:
        """One line for whoever waits."""
        point = " ".join(f"{name}={value}" for name, value in self.parameters.items())
        parts = [f"{point} | {self.candidate}:"]
        if self.milliseconds is not None:
            parts.append(f"{self.milliseconds.p50:.4g} ms")
        if self.baseline_ratio is not None:
            parts.append(f"{self.baseline_ratio:.3f} of baseline")
        if self.ideal_ratio is not None:
            parts.append(f"{self.ideal_ratio:.3f} of ideal")
        parts += [f"{name} {value:.5g}" for name, value in self.values.items()]
        if self.status != "ok":
            parts.append(f"{self.status} {self.note}")
        return " ".join(parts)


def reason(error: BaseException) -> str:
    """One line that says what was raised first, without the folders of this machine."""
    # A CUDA graph that cannot be captured says so once more when its block ends.
    while error.__context__ is not None:
        error = error.__context__
    text = str(error).strip().splitlines()
    return _PATH.sub("…", f"{type(error).__name__}: {text[0] if text else ''}")[:200]


def document(
    name: str,
    device: torch.device,
    measurements: Sequence[Measurement],
    *,
    smoke: bool,
    complete: bool,
    seconds: float,
) -> dict[str, Any]:
    """The content of a result file."""
    return {
        "format": FORMAT,
        "benchmark": name,
        "device": device_name(device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "smoke": smoke,
        "complete": complete,
        "seconds": round(seconds, 1),
        "measurements": [_rounded(dataclasses.asdict(m)) for m in measurements],
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's kind with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    """Of Python and of every package whose code is timed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    # The installed metadata leave out what the wheel was built for.
    found["torch"] = torch.__version__
    return found


def write(content: Mapping[str, Any], folder: Path) -> Path:
    """Write `<benchmark>.json`; an interrupted write leaves the old file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{content['benchmark']}.json"
    beside = path.with_suffix(".json.part")
    head = {name: value for name, value in content.items() if name != "measurements"}
    # One line per measurement: readable, and a rerun shows in a diff what moved.
    lines = ",\n".join(
        f"  {json.dumps(m, allow_nan=False, ensure_ascii=False)}" for m in content["measurements"]
    )
    start = json.dumps(head, indent=1, allow_nan=False, ensure_ascii=False)[:-2]
    beside.write_text(f'{start},\n "measurements": [\n{lines}\n ]\n}}\n', encoding="utf-8")
    os.replace(beside, path)
    return path


def read(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        ValueError: If it is not one, saying what is wrong.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    validate(content)
    return content


def merged(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One result of several of the same benchmark, such as of parts that ran beside each other.

    Of a candidate at a point the last measurement counts.

    Raises:
        ValueError: If there is none, or they are not of one benchmark, device and set of versions.
    """
    if not contents:
        raise ValueError("there is no result to merge")
    for name in ("benchmark", "device", "versions", "smoke"):
        different = {json.dumps(content[name]) for content in contents}
        if len(different) > 1:
            raise ValueError(f"{name}: the results differ, {' and '.join(sorted(different))}")
    found = {
        (measurement["candidate"], json.dumps(measurement["parameters"], sort_keys=True)): measurement
        for content in contents
        for measurement in content["measurements"]
    }
    return {
        **contents[-1],
        "date": max(content["date"] for content in contents),
        "complete": all(content["complete"] for content in contents),
        "seconds": round(sum(content["seconds"] for content in contents), 1),
        "measurements": list(found.values()),
    }


def validate(content: Any) -> None:
    """Raise ValueError unless `content` has the shape of a result file, whose times follow a passed check."""
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {type(content).__name__}")
    for name, kind in _DOCUMENT.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"{name}: expected {kind.__name__}, got {content.get(name)!r}")
    if content["format"] != FORMAT:
        raise ValueError(f"format: expected {FORMAT}, got {content['format']}")
    for package in ("python", "torch", "triton", "transformers"):
        if not isinstance(content["versions"].get(package), str):
            raise ValueError(f"versions: {package} is missing")
    datetime.date.fromisoformat(content["date"])
    for index, measurement in enumerate(content["measurements"]):
        problem = _problem(measurement)
        if problem:
            raise ValueError(f"measurement {index}: {problem}")


def _problem(measurement: Any) -> str | None:
    names = [f.name for f in dataclasses.fields(Measurement)]
    if not isinstance(measurement, dict) or sorted(measurement) != sorted(names):
        return f"expected the fields {names}, got {measurement!r}"
    if measurement["status"] not in STATES:
        return f"status is {measurement['status']!r}, allowed are {STATES}"
    time = measurement["milliseconds"]
    if time is not None:
        if measurement["status"] != "ok":
            return "a time without a passed check"
        if not 0 < time["p20"] <= time["p50"] <= time["p80"] or time["runs"] < 1:
            return f"percentiles out of order: {time}"
    elif measurement["status"] == "ok" and not measurement["values"]:
        return "neither a time nor a value"
    elif measurement["status"] != "ok" and not measurement["note"]:
        return "no time and no reason"
    return None


def _rounded(value: Any) -> Any:
    """Six digits of every number; None for what JSON has no word for."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value

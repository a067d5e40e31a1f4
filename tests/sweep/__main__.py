"""Run the sweep: `python -m sweep`, or some classes by name: `python -m sweep gemma3_text -v`.

With `src`, `kernels` and `tests` on the path. `--output` writes what `python -m sweep.table` makes the page of.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from sweep.outcomes import Result
from sweep.run import every, results_of


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sweep", description=__doc__)
    parser.add_argument("names", nargs="*", help="model types; all where none is named")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--output", type=Path, help="JSON file of all results")
    parser.add_argument("-v", "--verbose", action="store_true", help="every condition of every class")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.names) - set(every()))
    if unknown:
        parser.error(f"no such model type: {', '.join(unknown)}")
    names = chosen.names or list(every())
    results = []
    for result in results_of(names, chosen.jobs):
        results.append(result)
        print(
            f"{result.name:28} {result.use:8} {result.outcome:16} {result.seconds:5.1f} s  {result.detail}",
            flush=True,
        )
        if chosen.verbose:
            for condition, value in result.errors.items():
                print(f"    {condition:32} {value:9.2g}  allowed {result.limits[condition]:.2g}")
            for note in result.notes:
                print(f"    {note}")
            for condition, reason in result.skipped.items():
                print(f"    {condition:32} skipped: {reason}")
        if chosen.output is not None:
            _write(chosen.output, results)
    counts = Counter((result.use, result.outcome) for result in results if not result.variant)
    for use in ("decoder", "encoder"):
        parts = [f"{count} {outcome}" for (of, outcome), count in sorted(counts.items()) if of == use]
        print(f"{use}s: {', '.join(parts) or 'none'}")
    if any(result.outcome in ("wrong", "crashed") for result in results):
        raise SystemExit(1)


def _write(path: Path, results: list[Result]) -> None:
    packages = {"transformers": transformers.__version__, "torch": torch.__version__.partition("+")[0]}
    ordered = sorted(map(asdict, results), key=lambda result: (result["use"], result["name"]))
    path.write_text(json.dumps({"versions": packages, "results": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""`python -m benchmarks list | run [NAME ...] | merge NAME FOLDER ... | tables [--check]`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.frame import registry, results, tables, tiny
from benchmarks.frame.compare import release
from benchmarks.frame.registry import Benchmark, Settings
from benchmarks.frame.results import Measurement

_HERE = Path(__file__).parent
_RESULTS = _HERE / "results"
_DOCUMENTS = sorted((_HERE.parent / "docs" / "results").glob("*.md"))
# Often enough that a killed run loses little, seldom enough to cost nothing.
_SECONDS_BETWEEN_WRITES = 5.0
# Of `run`, that only some benchmarks read.
_INPUTS = ("data", "model", "texts", "plans", "only", "training")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 only if all that was asked for was done."""
    # `timeout` ends a run in this way; what was measured is then still written.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    registry.load()
    options = _parser().parse_args(arguments)
    if options.command == "list":
        for benchmark in registry.BENCHMARKS.values():
            print(f"{benchmark.name}: {benchmark.description}")
            hardware, *inputs = benchmark.needs()
            for line in (f"{hardware}; took {_last_time(benchmark)}", *inputs):
                print(textwrap.indent(textwrap.fill(line, 100, break_on_hyphens=False), "    "))
        return 0
    if options.command == "tables":
        return _tables(options.results, check=options.check)
    if options.command == "merge":
        return _merge(options.name, options.folders, options.out)
    return _run(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure what slimformer claims."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what each benchmark measures, how long it takes, and on what")
    run = commands.add_parser("run", help="measure, and write one JSON file per benchmark")
    run.add_argument("names", nargs="*", metavar="NAME", help="which; without any, all that can run here")
    run.add_argument(
        "--smoke", action="store_true", help="tiny sizes on the CPU: try the code, not the speed"
    )
    run.add_argument("--out", type=Path, help="folder of the result files (default: benchmarks/results)")
    run.add_argument("--data", type=Path, help="folder of the data sets that `list` names")
    run.add_argument("--model", type=Path, help="checkpoint folder, or a GGUF file of a decoder")
    run.add_argument("--texts", type=int, help="texts per point, where that can be chosen")
    run.add_argument("--plans", type=Path, help="folder where repaired plans are kept, and found again")
    run.add_argument(
        "--only",
        help="measure one part alone, or several with commas: attention-8 of repair, 2048 of elimination_quality",
    )
    run.add_argument(
        "--training", type=float, help="minutes that each training may take, where that is asked"
    )
    run.add_argument("--minutes", type=float, help="stop a benchmark after so long and keep what it has")
    merging = commands.add_parser(
        "merge", help="make one result file of those of parts that ran by themselves"
    )
    merging.add_argument("name", metavar="NAME", help="the benchmark")
    merging.add_argument(
        "folders", nargs="+", type=Path, metavar="FOLDER", help="searched with what is in them"
    )
    merging.add_argument("--out", type=Path, default=_RESULTS, help="folder of the merged file")
    tabled = commands.add_parser("tables", help="rewrite the tables in the README files from the results")
    tabled.add_argument("--check", action="store_true", help="change nothing; exit 1 where a table is stale")
    tabled.add_argument("--results", type=Path, default=_RESULTS, help=argparse.SUPPRESS)
    return parser


def _last_time(benchmark: Benchmark) -> str:
    """How long the published run took, and on what."""
    path = _RESULTS / f"{benchmark.name}.json"
    if not path.exists():
        return "an unknown time"
    content = results.read(path)
    seconds = content["seconds"]
    took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    stopped = "" if content["complete"] else " until it was stopped"
    return f"{took}{stopped} on {content['device']}"


def _run(options: argparse.Namespace) -> int:
    unknown = [name for name in options.names if name not in registry.BENCHMARKS]
    if unknown:
        print(f"No benchmark is named {', '.join(unknown)}. There are: {', '.join(registry.BENCHMARKS)}.")
        return 2
    if options.only is not None and not options.names:
        print(f"--only {options.only} is a part of one benchmark, and none is named: run NAME --only PART.")
        return 2
    given = {name: value for name in _INPUTS if (value := getattr(options, name)) is not None}
    # A smoke run needs no GPU and must not take one from somebody who measures.
    on_gpu = torch.cuda.is_available() and not options.smoke
    settings = Settings(torch.device("cuda" if on_gpu else "cpu"), options.smoke, **given)
    problems = {name: _problems(name, settings, list(given), options) for name in registry.BENCHMARKS}
    if options.names and any(problems[name] for name in options.names):
        for name in options.names:
            for problem in problems[name]:
                print(f"{name} {problem}.")
        return 2
    done = True
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if options.smoke:
            tiny.write_models(scratch)
            tiny.write_data(scratch / "data")
            settings = dataclasses.replace(settings, data=given.get("data", scratch / "data"))
        for name in options.names or registry.BENCHMARKS:
            if problems[name]:
                print(f"{name}: left out, it {problems[name][0]}")
                continue
            benchmark = registry.BENCHMARKS[name]
            own: dict[str, Any] = {"plans": options.plans or scratch / "plans" / name}
            if options.smoke and "model" not in given:
                own["model"] = scratch / (benchmark.model or "")
            if benchmark.on == "CPU":
                own["device"] = torch.device("cpu")
            done = _measured(benchmark, dataclasses.replace(settings, **own), options) and done
            release()
    return 0 if done else 1


def _problems(name: str, settings: Settings, given: list[str], options: argparse.Namespace) -> list[str]:
    """Why a benchmark cannot run; an option that it does not take matters only where it was named."""
    benchmark = registry.BENCHMARKS[name]
    refused = list(benchmark.refused(settings, given)) if name in options.names else []
    return [*benchmark.missing(settings, given), *refused]


def _measured(benchmark: Benchmark, settings: Settings, options: argparse.Namespace) -> bool:
    # Smoke times mean nothing, so they only go where somebody asked for them.
    out = options.out or (None if options.smoke else _RESULTS)
    try:
        return _measure(benchmark, settings, out, options.minutes)
    except Exception as failure:
        # Minutes on a GPU are dear: the benchmarks after this one still run.
        traceback.print_exc()
        print(f"{benchmark.name}: broken, {results.reason(failure)}", flush=True)
        return False


def _measure(benchmark: Benchmark, settings: Settings, out: Path | None, minutes: float | None) -> bool:
    """Run one benchmark, print its lines and tables, and write its file as it grows."""
    torch.manual_seed(0)
    measurements: list[Measurement] = []
    start = last_write = time.monotonic()
    complete = False

    def document() -> dict[str, Any]:
        return results.document(
            benchmark.name,
            settings.device,
            measurements,
            smoke=settings.smoke,
            complete=complete,
            seconds=time.monotonic() - start,
        )

    def write() -> None:
        if out is not None and measurements:
            content = document()
            results.validate(content)
            results.write(content, out)

    print(f"== {benchmark.name}: {benchmark.description}", flush=True)
    try:
        with torch.no_grad():
            for measurement in benchmark.run(settings):
                measurements.append(measurement)
                print(f"{benchmark.name} {measurement.line()}", flush=True)
                now = time.monotonic()
                if minutes is not None and now - start > 60 * minutes:
                    print(f"{benchmark.name}: stopped after {minutes:g} minutes, not complete")
                    break
                if now - last_write > _SECONDS_BETWEEN_WRITES:
                    write()
                    last_write = now
            else:
                complete = True
    finally:
        write()
    content = document()
    for table in registry.TABLES.values():
        if table.source == benchmark.name:
            print(f"\n{tables.render(table, content)}\n")
    print(f"== {benchmark.name}: {content['seconds']:.0f} s, {len(measurements)} measurements", flush=True)
    return complete and all(m.status in ("ok", "unsupported") for m in measurements)


def _merge(name: str, folders: Sequence[Path], out: Path) -> int:
    """Later files win over earlier ones."""
    files = [path for folder in folders for path in sorted(folder.rglob(f"{name}.json"))]
    try:
        content = results.merged([results.read(path) for path in sorted(files, key=os.path.getmtime)])
    except ValueError as error:
        print(f"{name} cannot be merged: {error}.")
        return 2
    print(
        f"{results.write(content, out).name}: {len(files)} files, {len(content['measurements'])} measurements"
    )
    return 0


def _tables(folder: Path, *, check: bool) -> int:
    stale = False
    for path in _DOCUMENTS:
        if not path.exists():
            continue
        old = path.read_text(encoding="utf-8")
        new = tables.updated(old, folder)
        if new == old:
            continue
        stale = True
        name = os.path.relpath(path, _HERE.parent)
        print(f"{name}: {'stale, run python -m benchmarks tables' if check else 'rewritten'}")
        if not check:
            path.write_text(new, encoding="utf-8")
    return 1 if stale and check else 0


if __name__ == "__main__":
    sys.exit(main())

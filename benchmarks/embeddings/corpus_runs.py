"""A corpus through `slimformer embed` on two workers: as it is, and killed at random; row for row the same."""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.embeddings.inputs import sentences
from benchmarks.frame import tables
from benchmarks.frame.inputs import STS_TRAIN
from benchmarks.frame.registry import Settings, benchmark, table
from benchmarks.frame.results import Measurement

# Of a million texts, shards are as large as they are by themselves; of fewer, there are as many as can be killed in.
_TEXTS, _SHARDS, _WORKERS, _KILLS = 1_000_000, 50, 2, 10
_SPEED, _KILLED, _ROUNDS = "undisturbed", "killed", 3
_PACKAGES = ("ray", "pyarrow", "psutil", "sentence_transformers")
# What a worker does, without Ray: rates of texts that are in memory already.
_PROGRAM = """
import sys, time
import pyarrow.parquet as parquet
from slimformer.cli.loading import load_embedder
from slimformer.corpora.embedder import Embedder
model, corpus, first, rows, shards = *sys.argv[1:3], *map(int, sys.argv[3:])
embedder = Embedder(lambda: load_embedder(model, "cpu"), threads=1)
texts = parquet.read_table(corpus, columns=["text"])["text"].slice(first, rows * shards).to_pylist()
embedder.embed(texts[:rows // 4])
print("ready", flush=True)
sys.stdin.readline()
start = time.monotonic()
for shard in range(0, len(texts), rows):
    embedder.embed(texts[shard : shard + rows])
print(len(texts) / (time.monotonic() - start), flush=True)
"""


@benchmark(
    "corpus_runs",
    "a corpus through slimformer embed on two workers: beside its workers alone, and killed ten times at random",
    on="CPU",
    model="embedding model",
    data=(STS_TRAIN,),
    parts=(_SPEED, _KILLED),
    takes=("texts",),
)
def run(settings: Settings) -> Iterator[Measurement]:
    """Sentences of STS-B repeated and perturbed. Of the killed run every file of vectors is that of the undisturbed."""
    absent = [name for name in _PACKAGES if find_spec(name) is None]
    if absent:
        yield Measurement({}, _KILLED, status="unsupported", note=f"not installed: {', '.join(absent)}")
        return
    count = settings.texts or settings.pick(_TEXTS, 400)
    rows = max(16, min(8192, count // _SHARDS))
    at = {"texts": count, "rows of a shard": rows, "workers": _WORKERS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        corpus = folder / "corpus.parquet"
        _write_corpus(corpus, sentences(settings), count)
        if _SPEED in settings.chosen((_SPEED, _KILLED)):
            rounds = settings.pick(_ROUNDS, 1)
            yield Measurement(at, _SPEED, values=_speeds(settings, corpus, folder, rows, count, rounds))
        if _KILLED in settings.chosen((_SPEED, _KILLED)):
            first, second = folder / "undisturbed", folder / "killed"
            memory = _Run(settings, corpus, first, rows).to_end()
            kills, seconds = _killed(settings, corpus, second, rows, settings.pick(_KILLS, 2))
            different = _different(first, second)
            values = {**memory, **kills, "seconds": seconds, "files that differ": len(different)}
            status = "wrong" if different else "ok"
            yield Measurement(at, _KILLED, status, values=values, note=", ".join(different[:3]))


def _speeds(
    settings: Settings, corpus: Path, folder: Path, rows: int, count: int, rounds: int
) -> dict[str, float]:
    """Texts per second of the command and of its workers alone, by turns, as others use the machine too: medians."""
    # As much of the corpus as says how fast they are.
    shards = max(1, min(12, count // rows // _WORKERS))
    alone, whole = [], []
    for number in range(rounds):
        alone.append(_alone(settings, corpus, rows, shards))
        one = _Run(settings, corpus, folder / f"round-{number}", rows)
        one.to_end()
        whole.append(one.speed(rows, count))
    alone.append(_alone(settings, corpus, rows, shards))
    # Each beside what was measured before and behind it.
    parts = [2 * speed / (alone[n] + alone[n + 1]) for n, speed in enumerate(whole)]
    return {
        "texts per second": statistics.median(whole),
        "alone": statistics.median(alone),
        "of the workers alone": statistics.median(parts),
        "least": min(parts),
        "most": max(parts),
    }


def _write_corpus(path: Path, texts: list[str], count: int) -> None:
    """Every text is another: a word is repeated, and a number put somewhere in it."""
    import pyarrow  # noqa: PLC0415
    import pyarrow.parquet as parquet  # noqa: PLC0415

    drawn = random.Random(0)
    schema = pyarrow.schema([("id", pyarrow.string()), ("text", pyarrow.string())])
    with parquet.ParquetWriter(path, schema) as writer:
        for first in range(0, count, 50_000):
            numbers = range(first, min(first + 50_000, count))
            made = []
            for number in numbers:
                words = drawn.choice(texts).split()
                words.insert(drawn.randrange(len(words)), drawn.choice(words))
                words.insert(drawn.randrange(len(words)), str(number))
                made.append(" ".join(words))
            writer.write_table(pyarrow.table([[f"d{n}" for n in numbers], made], schema=schema))


def _alone(settings: Settings, corpus: Path, rows: int, shards: int) -> float:
    """Texts per second of as many processes as there are workers, at the same time, together."""
    pipes: dict[str, Any] = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
    }
    # As Ray starts its own: a busy machine divides its time among sessions first.
    pipes["start_new_session"] = True
    command = [sys.executable, "-c", _PROGRAM, str(settings.model), str(corpus)]
    running: list[Any] = [
        subprocess.Popen([*command, *map(str, (n * rows * shards, rows, shards))], text=True, **pipes)
        for n in range(_WORKERS)
    ]
    for process in running:
        process.stdout.readline()
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    return sum(float(process.communicate()[0]) for process in running)


class _Run:
    """One run of the command."""

    def __init__(self, settings: Settings, corpus: Path, output: Path, rows: int) -> None:
        self.vectors = output / "vectors"
        command = [
            sys.executable,
            "-m",
            "slimformer",
            "embed",
            settings.model,
            "--input",
            corpus,
            "-o",
            output,
        ]
        options = ["--id-column", "id", "--shard-rows", rows, "--workers", _WORKERS, "--threads", 1]
        self.errors = (output.parent / f"{output.name}.log").open("w+")
        self.process = subprocess.Popen(
            [str(word) for word in [*command, *options, "--device", "cpu"]], stderr=self.errors
        )

    @property
    def done(self) -> int:
        """Shards that are finished."""
        return len(list(self.vectors.glob("part-*"))) if self.vectors.is_dir() else 0

    def children(self) -> list[Any]:
        """All processes that it started, and those that these did."""
        psutil = import_module("psutil")

        try:
            return list(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def workers(self) -> list[Any]:
        """Those that embed."""
        return [child for child in self.children() if _titled(child, "ray::MapWorker")]

    def to_end(self) -> dict[str, float]:
        """The memory of a worker and of the driver, in MB, early in the run and late."""
        memory: list[tuple[int, float, float]] = []
        stop = threading.Event()

        def watch() -> None:
            while not stop.wait(0.5):
                memory.append((self.done, *self._memory()))

        watching = threading.Thread(target=watch)
        watching.start()
        code = self.process.wait()
        stop.set()
        watching.join()
        if code:
            self.errors.seek(0)
            raise RuntimeError(f"the run ended with {code}: {self.errors.read()[-500:]}")
        total = self.done
        found: dict[str, float] = {}
        for name, low, high in (("early", 0.1, 0.3), ("late", 0.7, 0.9)):
            taken = [both for done, *both in memory if low * total <= done <= high * total]
            if taken:
                found[f"worker, MB, {name}"] = max(worker for worker, _ in taken)
                found[f"driver, MB, {name}"] = max(driver for _, driver in taken)
        return found

    def speed(self, rows: int, count: int) -> float:
        """Texts per second from the first finished shard to the last."""
        ends = sorted(path.stat().st_mtime for path in self.vectors.glob("part-*"))
        return (count - rows) / max(ends[-1] - ends[0], 1e-3)

    def _memory(self) -> tuple[float, float]:
        """Of the largest worker, and of the driver, without what processes share."""
        psutil = import_module("psutil")

        def own(process: Any) -> float:
            try:
                info = process.memory_info()
            except psutil.Error:
                return 0.0
            return (info.rss - info.shared) / 2**20

        try:
            return max(map(own, self.workers()), default=0.0), own(psutil.Process(self.process.pid))
        except psutil.NoSuchProcess:
            return 0.0, 0.0


def _titled(process: Any, text: str) -> bool:
    psutil = import_module("psutil")

    try:
        return any(text in word for word in process.cmdline())
    except psutil.Error:
        return False


def _killed(
    settings: Settings, corpus: Path, output: Path, rows: int, kills: int
) -> tuple[dict[str, float], float]:
    """Run to the end, and kill a worker or the driver ten times at random, each after some more shards.

    Returns:
        How many of each were killed, and the seconds that all of it took.
    """
    drawn = random.Random(0)
    start = time.monotonic()
    run = _Run(settings, corpus, output, rows)
    counted = {"workers killed": 0.0, "drivers killed": 0.0}
    shards = -(-_rows_of(corpus) // rows)
    victims = [*counted] * (kills // 2)
    drawn.shuffle(victims)
    for number, victim in enumerate(victims):
        # They are spread over all of the corpus, and fall anywhere between two shards.
        _wait(run, drawn.uniform(number, number + 0.9) / kills * shards)
        time.sleep(drawn.uniform(0, 0.5))
        while not (workers := run.workers()) and run.process.poll() is None:
            time.sleep(0.05)
        if run.process.poll() is not None:
            break
        counted[victim] += 1
        if victim == "workers killed":
            drawn.choice(workers).kill()
            continue
        run.process.kill()
        run.process.wait()
        # What it started ends by itself, and takes time from the next run until then.
        _wait_for_end(workers)
        run = _Run(settings, corpus, output, rows)
    run.to_end()
    return counted, time.monotonic() - start


def _rows_of(corpus: Path) -> int:
    import pyarrow.parquet as parquet  # noqa: PLC0415

    return int(parquet.read_metadata(corpus).num_rows)


def _wait(run: _Run, shards: float) -> None:
    while run.done < shards and run.process.poll() is None:
        time.sleep(0.05)


def _wait_for_end(processes: list[Any]) -> None:
    """Wait for the workers of a driver that was killed.

    Raises:
        RuntimeError: If one does not end.
    """
    psutil = import_module("psutil")

    _, alive = psutil.wait_procs(processes, timeout=60)
    if alive:
        raise RuntimeError(f"{len(alive)} workers of a driver that was killed did not end")


def _different(first: Path, second: Path) -> list[str]:
    """Files of two folders that are not the same, byte for byte."""
    names = {path.relative_to(root) for root in (first, second) for path in root.rglob("part-*")}
    return sorted(
        str(name)
        for name in names
        if not all((root / name).exists() for root in (first, second))
        or (first / name).read_bytes() != (second / name).read_bytes()
    )


@table("corpus_runs")
def runs(content: dict[str, Any]) -> str:
    """Texts per second, memory, and what was killed."""
    columns = {
        "Two workers of one thread": tables.candidate,
        "texts": lambda found: f"{found['parameters']['texts']:,}",
        "texts per second": tables.value("texts per second", ".0f"),
        "of the workers alone": _part_of,
        "a worker, early and late": _memory_of("worker"),
        "the driver, early and late": _memory_of("driver"),
        "workers and drivers killed": _killed_of,
        "files that differ": tables.value("files that differ", ".0f"),
    }
    return tables.by_measurement(content, columns)


def _part_of(found: Any) -> str:
    low, mid, high = (tables.figure(found, name) for name in ("least", "of the workers alone", "most"))
    return "–" if mid is None else f"{mid:.2f} ({low:.2f} to {high:.2f})"


def _memory_of(name: str) -> tables.Cell:
    def cell(found: Any) -> str:
        values = [tables.figure(found, f"{name}, MB, {when}") for when in ("early", "late")]
        return "–" if None in values else " and ".join(tables.shown(v, ".0f", " MB") for v in values)

    return cell


def _killed_of(found: Any) -> str:
    values = [tables.figure(found, f"{name} killed") for name in ("workers", "drivers")]
    return "–" if None in values else " and ".join(tables.shown(v, ".0f") for v in values)

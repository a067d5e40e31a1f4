"""A whole corpus on Ray Data: parts are read, shards embedded, and what comes back is written by one process."""

from __future__ import annotations

import functools
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from slimformer.corpora.embedder import Embedder, Encoding, Vectors, loader_of
from slimformer.corpora.pace import Pace
from slimformer.corpora.precision import Precision, kept, ranges_of
from slimformer.corpora.rows import Rows
from slimformer.errors import DataError, SlimformerError
from slimformer.integrations.ray.cluster import (
    READER_CPUS,
    Workers,
    cores_here,
    from_anywhere,
    import_ray,
    quiet_blocks_of_one_row,
    running_ray,
    workers_on,
)
from slimformer.plans.plan import Plan

# Parts of the corpus, and rows of the first shard of each, that the ranges of int8 are taken from.
_CALIBRATION_PARTS, _CALIBRATION_ROWS = 8, 1024
# A shard in hand and one in front of it: more would wait for a worker while another is idle at the end.
_SHARDS_PER_WORKER = 2


@dataclass(frozen=True)
class CorpusRun:
    """What is embedded, and how its vectors are kept.

    Attributes:
        source: A Parquet or JSON lines file, a folder or pattern of such, or an address that fsspec opens (`hf://`).
        text_column: The column with the text.
        id_column: The column with the ids; None where rows are known by their numbers alone.
        encoding: Prompt, dimensions, length, and tokens of a batch.
        precision: What a number of a vector is kept in: "float32", "float16" or "int8".
        shard_rows: Rows that are embedded and written as one. What is done of a shard is lost when a run is killed.
        max_bad: At more rows without an embedding the run ends.
    """

    source: str
    text_column: str = "text"
    id_column: str | None = None
    encoding: Encoding = field(default_factory=Encoding)
    precision: str = "float32"
    shard_rows: int = 8192
    max_bad: int = 1000

    def __post_init__(self) -> None:
        allowed = [precision.value for precision in Precision]
        if self.precision not in allowed:
            raise DataError(f"precision is one of {', '.join(allowed)}, got {self.precision!r}.")
        if self.shard_rows < 1 or self.max_bad < 0:
            raise DataError(
                f"shard_rows is at least 1 and max_bad at least 0, got {self.shard_rows} and {self.max_bad}."
            )


def embed_corpus(
    run: CorpusRun,
    output: str | os.PathLike[str],
    model: str | Callable[[str], Any],
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    address: str | None = None,
    workers: int | None = None,
    threads: int | None = None,
    device: str = "auto",
    matrix: bool = False,
    progress: Callable[[Pace], None] | None = None,
) -> dict[str, int]:
    """Embed a corpus into a folder of Parquet shards, or go on with that where an earlier run ended.

    Args:
        run: What to embed.
        output: The folder: `vectors/part-*.parquet` (row, id, embedding), `bad_rows/part-*.jsonl` (row, id, reason) and
            `manifest.json`.
        model: A folder or Hub id that every worker can load, or a function that makes a SentenceTransformer on the
            device that it is given, "cpu" or "cuda".
        plan: A plan, or where one is on every worker; without one only what loses nothing is applied.
        address: Of a Ray cluster; None starts one on this machine.
        workers: How many; None for one per GPU or, without any, per group of cores.
        threads: Of each, on a CPU.
        device: "cpu", "cuda", or "auto" for GPUs where there are any.
        matrix: Whether to write all vectors as one `vectors.npy`, too, with `keys.parquet`.
        progress: Is told whenever a shard is written.

    Returns:
        How many `rows` have vectors, how many are `bad_rows`, and the `shards` they are in.

    Raises:
        DataError: If the corpus cannot be read, the folder is another run's or cannot be written, or more rows are bad
            than may be. What is finished stays, and the same call goes on from there.
        SlimformerError: If Ray or the model is not there.

    Example:
        >>> run = CorpusRun("corpus.parquet", id_column="id", precision="float16")
        >>> embed_corpus(run, "vectors", "my-encoder", "plans/mine")  # doctest: +SKIP
        {'rows': 1000000, 'bad_rows': 0, 'shards': 123}
    """
    import_ray()
    # These need pyarrow, which is known to be there from here on.
    from slimformer.corpora.matrix import write_matrix  # noqa: PLC0415
    from slimformer.corpora.output import OutputFolder  # noqa: PLC0415
    from slimformer.corpora.source import open_corpus  # noqa: PLC0415

    corpus = open_corpus(run.source, run.text_column, run.id_column, run.shard_rows)
    with OutputFolder(Path(output), _identity(run, corpus)) as folder:
        pace = Pace(corpus.rows, folder.rows)
        _check_bad(folder, run)
        if len(folder.finished) < corpus.shards:
            cpus = max(cores_here(), (workers or 1) * (threads or 1))
            with running_ray(address, cpus) as ray, quiet_blocks_of_one_row(ray):
                there = ray.cluster_resources()
                # One core is for those that read.
                known = max(1, int(there.get("CPU", 1)) - 1)
                group = workers_on(known, int(there.get("GPU", 0)), workers, threads, device)
                load = loader_of(from_anywhere(model))
                pipeline = _Pipeline(ray, run, corpus, group, load, from_anywhere(plan))
                pipeline.write_into(folder, pace, progress)
        if len(folder.finished) < corpus.shards:
            raise SlimformerError("Ray ended before all shards were there. The same call goes on.")
        folder.complete()
        if matrix:
            write_matrix(folder)
        good = sum(shard.rows for shard in folder.finished.values())
        return {"rows": good, "bad_rows": folder.bad, "shards": len(folder.finished)}


def _identity(run: CorpusRun, corpus: Any) -> dict[str, Any]:
    """What makes vectors what they are, but for the model; how fast they come and in which batches does not."""
    return {
        "input": corpus.identity,
        "text_column": run.text_column,
        "id_column": run.id_column,
        "prompt_name": run.encoding.prompt_name,
        "truncate_dim": run.encoding.truncate_dim,
        "normalize": run.encoding.normalize,
        "precision": run.precision,
        "shard_rows": run.shard_rows,
    }


def _check_bad(folder: Any, run: CorpusRun) -> None:
    if folder.bad > run.max_bad:
        raise DataError(
            f"{folder.bad:,} rows could not be embedded, and {run.max_bad:,} may (--max-bad). Which and why is in "
            f"{folder.folder / 'bad_rows'}. Mend the corpus, or allow more: then the same command goes on."
        )


@dataclass
class _Pipeline:
    """The steps of a run on Ray Data."""

    ray: Any
    run: CorpusRun
    corpus: Any
    workers: Workers
    load: Callable[[str], Any]
    plan: Plan | str | os.PathLike[str] | None

    def write_into(self, folder: Any, pace: Pace, progress: Callable[[Pace], None] | None) -> None:
        """Embed and write all shards that are not finished."""
        if self.run.precision == Precision.int8.value and folder.ranges() is None:
            # The same for all shards, so they are known before the first.
            folder.keep_ranges(self._calibrated(folder))
        ranges = None if folder.ranges() is None else np.asarray(folder.ranges(), dtype=np.float32)
        wanted = frozenset(range(self.corpus.shards)) - folder.finished.keys()
        worker = functools.partial(
            _Vectors, Precision(self.run.precision), ranges, self.corpus.id_type, folder.run
        )
        for done in self._results(wanted, worker):
            folder.same_model(done["model"], done["host"])
            bad = pickle.loads(done["bad"])
            folder.write(done["shard"], done["file"], done["rows"], bad)
            pace.count(done["rows"] + len(bad), done["seconds"])
            if progress is not None:
                progress(pace)
            _check_bad(folder, self.run)

    def _calibrated(self, folder: Any) -> list[list[float]]:
        """The ranges of int8, of rows from all over the corpus."""
        parts = self.corpus.parts
        chosen = {
            parts[len(parts) * i // _CALIBRATION_PARTS].shards[0].number for i in range(_CALIBRATION_PARTS)
        }
        found = []
        for done in self._results(frozenset(chosen), _Ranges):
            folder.same_model(done["model"], done["host"])
            if done["rows"]:
                found.append(np.frombuffer(done["file"], np.float32).reshape(2, -1))
        if not found:
            raise DataError(
                "The rows that int8 is calibrated by are all bad. Keep float32, or mend the corpus."
            )
        ranges: list[list[float]] = ranges_of(found).tolist()
        return ranges

    def _results(self, wanted: frozenset[int], made: Callable[[], Any]) -> Iterator[dict[str, Any]]:
        """What the workers make of the shards, as they are done."""
        # Of a module without torch, which processes that read need not import.
        from slimformer.corpora.reading import shard_tables  # noqa: PLC0415

        data, corpus = self.ray.data, self.corpus
        parts = [part for part in corpus.parts if any(shard.number in wanted for shard in part.shards)]
        # One reads as many texts as several embed.
        readers = min(len(parts), max(2, self.workers.count // 4))
        device = "cuda" if self.workers.gpus else "cpu"
        threads = None if self.workers.gpus else self.workers.threads
        make = functools.partial(
            Embedder, functools.partial(self.load, device), self.plan, self.run.encoding, threads=threads
        )
        dataset = (
            data.range(len(parts), override_num_blocks=len(parts))
            .map_batches(
                functools.partial(shard_tables, corpus, parts, wanted), batch_size=1, batch_format="pyarrow",
                num_cpus=READER_CPUS, compute=data.TaskPoolStrategy(size=readers),
            )
            .map_batches(
                _Worker, fn_constructor_kwargs={"make": make, "made": made}, batch_size=1, batch_format="pyarrow",
                compute=data.ActorPoolStrategy(
                    size=min(self.workers.count, len(wanted)),
                    max_tasks_in_flight_per_actor=_SHARDS_PER_WORKER,
                ),
                **self.workers.options,
            )
        )  # fmt: skip
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for done in table.to_pylist():
                if done["error"]:
                    raise SlimformerError(f"{done['error']} (on {done['host']})")
                yield done


class _Worker:
    """A process that embeds shards; what goes wrong on purpose goes back as a value, so that it is said in one line."""

    def __init__(self, make: Callable[[], Embedder], made: Callable[[], Any]) -> None:
        self.error, self.host = "", socket.gethostname()
        try:
            self.embedder, self.made = make(), made()
        except SlimformerError as error:
            self.error = str(error)

    def __call__(self, table: Any) -> Any:
        import pyarrow  # noqa: PLC0415

        shard, file, rows, bad, model = -1, b"", 0, pickle.dumps([]), ""
        begun = time.monotonic()
        error = self.error or table["error"][0].as_py()
        if not error:
            given: Rows = pickle.loads(table["rows"][0].as_py())
            try:
                file, left = self.made(self.embedder, given)
            except SlimformerError as raised:
                error = str(raised)
            else:
                shard, rows, bad = given.shard, len(left.numbers), pickle.dumps(left.bad)
                model = self.embedder.fingerprint
        done = {
            "shard": shard, "file": pyarrow.array([file], pyarrow.large_binary()), "rows": rows, "bad": bad,
            "model": model, "host": self.host, "error": error, "seconds": time.monotonic() - begun,
        }  # fmt: skip
        return pyarrow.table({name: v if isinstance(v, pyarrow.Array) else [v] for name, v in done.items()})


class _Vectors:
    """Makes the file of a shard."""

    def __init__(self, precision: Precision, ranges: Vectors | None, id_type: Any, run: str) -> None:
        self.precision, self.ranges, self.id_type, self.run = precision, ranges, id_type, run

    def __call__(self, embedder: Embedder, rows: Rows) -> tuple[bytes, Rows]:
        from slimformer.corpora.shards import shard_bytes  # noqa: PLC0415

        vectors, reasons = embedder.embed(rows.texts)
        stored, more = kept(vectors, self.precision, self.ranges)
        reasons = {**more, **reasons}
        good = [place for place in range(len(rows.texts)) if place not in reasons]
        left = rows.without(reasons)
        return shard_bytes(left, stored[good] if reasons else stored, self.id_type, self.run), left


class _Ranges:
    """Finds the least and the largest value of each number in the first rows of a shard."""

    def __call__(self, embedder: Embedder, rows: Rows) -> tuple[bytes, Rows]:
        vectors, reasons = embedder.embed(rows.texts[:_CALIBRATION_ROWS])
        good = np.delete(vectors, list(reasons), axis=0)
        left = Rows(rows.shard, list(range(len(good))))
        return (np.stack([good.min(axis=0), good.max(axis=0)]).tobytes() if len(good) else b""), left

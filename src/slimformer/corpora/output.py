"""The folder of a run: what it is of, the shards that are finished, and the rows that could not be embedded."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from slimformer.corpora.rows import BadRow, bad_lines
from slimformer.corpora.shards import said_by
from slimformer.errors import DataError

MANIFEST = "manifest.json"
VECTORS, BAD_ROWS = "vectors", "bad_rows"
_LOCK = ".lock"
_FORMAT = 1
# The prefix of what is being written, which a run that was killed leaves behind.
_UNFINISHED = ".writing-"


@dataclass(frozen=True)
class Finished:
    """A shard whose file is there.

    Attributes:
        rows: Rows with a vector.
        bad: Rows without.
    """

    rows: int
    bad: int


class OutputFolder:
    """A folder that one run writes, and that the same run finds again.

    A shard is finished when its file has its name: files are written beside it and renamed, so that none is ever half
    there. While the folder is open no other process can write it.

    Args:
        folder: The folder, new, empty, or of the same run.
        run: What the run is of: corpus and settings. A folder of another run is refused.

    Attributes:
        finished: What is finished, by shard.
        run: SHA-256 of what the run is of, without the model.

    Raises:
        DataError: If the folder is another run's, holds other files, is being written, or cannot be.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any]) -> None:
        self.folder = folder
        self.finished: dict[int, Finished] = {}
        self._manifest: dict[str, Any] = {"format": _FORMAT, "run": dict(run)}
        self.run = hashlib.sha256(json.dumps(dict(run), sort_keys=True).encode()).hexdigest()
        self._lock = FileLock(folder / _LOCK)

    def __enter__(self) -> OutputFolder:
        _check(self.folder)
        with self._writing():
            for name in (VECTORS, BAD_ROWS):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise DataError(
                    f"Another process is writing {self.folder}. Wait for it, or end it; then the same command goes on."
                ) from error
        try:
            self._begin()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        self._lock.release()

    @property
    def model(self) -> str | None:
        """The fingerprint of the model whose vectors are in it; None while there are none."""
        return self._manifest.get("model")

    @property
    def bad(self) -> int:
        """Rows that could not be embedded."""
        return sum(shard.bad for shard in self.finished.values())

    @property
    def rows(self) -> int:
        """Rows that were, and those that could not be."""
        return sum(shard.rows + shard.bad for shard in self.finished.values())

    def same_model(self, fingerprint: str, where: str) -> None:
        """Note the model whose vectors come, or see that it is the one whose vectors are there.

        Raises:
            DataError: If it is another.
        """
        if self.model is None:
            self._manifest["model"] = fingerprint
            self._write_manifest()
        elif self.model != fingerprint:
            raise DataError(
                f"The model or plan on {where} is not the one whose vectors are in {self.folder}: its weights, "
                "configuration, tokenizer, dtype or plan differ. Use the same everywhere, or choose another folder."
            )

    def ranges(self) -> list[list[float]] | None:
        """The ranges of int8 that the run goes by; None where they are not known yet."""
        return self._manifest.get("int8_ranges")

    def keep_ranges(self, ranges: list[list[float]]) -> None:
        """Keep the ranges of int8, before the first shard."""
        self._manifest["int8_ranges"] = ranges
        self._write_manifest()

    def write(self, number: int, content: bytes, rows: int, bad: list[BadRow]) -> None:
        """Write a shard; its bad rows come first, so that a finished one never lacks them.

        Raises:
            DataError: If it cannot be written; what is finished stays.
        """
        if bad:
            self._put(self.folder / BAD_ROWS / f"part-{number:06d}.jsonl", bad_lines(bad).encode())
        self._put(self.shard(number), content)
        self.finished[number] = Finished(rows, len(bad))

    def shard(self, number: int) -> Path:
        """The file of a shard."""
        return self.folder / VECTORS / f"part-{number:06d}.parquet"

    def complete(self) -> None:
        """Say in the manifest that all is there."""
        rows = sum(shard.rows for shard in self.finished.values())
        self._manifest["complete"] = {"rows": rows, "bad_rows": self.bad, "shards": len(self.finished)}
        self._write_manifest()

    def _begin(self) -> None:
        file = self.folder / MANIFEST
        if file.exists():
            self._go_on(file)
        else:
            self._write_manifest()
        for place in (self.folder, self.folder / VECTORS, self.folder / BAD_ROWS):
            for left in place.glob(f"{_UNFINISHED}*"):
                left.unlink(missing_ok=True)
        for path in sorted((self.folder / VECTORS).glob("part-*.parquet")):
            number = int(path.stem.partition("-")[2])
            try:
                run, rows, bad = said_by(path)
            # pyarrow's own are children of these.
            except (OSError, ValueError, KeyError) as error:
                raise DataError(
                    f"{path} is damaged: {error}. Delete it, and the same command writes it again."
                ) from error
            if run != self.run:
                raise DataError(f"{path} was written by another run. Choose another output folder.")
            self.finished[number] = Finished(rows, bad)

    def _go_on(self, file: Path) -> None:
        try:
            there = json.loads(file.read_text("utf-8"))
            known = dict(there["run"])
            if there["format"] != _FORMAT:
                raise ValueError(f"format {there['format']}, and this version writes {_FORMAT}")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise DataError(f"{file} cannot be read: {error!r}. Choose another output folder.") from error
        wanted = json.loads(json.dumps(self._manifest["run"]))
        different = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
        if different:
            said = "; ".join(
                f"{name} was {_short(known.get(name))} and is {_short(wanted.get(name))}"
                for name in different
            )
            raise DataError(
                f"{self.folder} holds another run: {said}. Give what it was begun with, or another output folder."
            )
        self._manifest = there

    def _write_manifest(self) -> None:
        content = json.dumps(self._manifest, indent=2, ensure_ascii=False) + "\n"
        self._put(self.folder / MANIFEST, content.encode("utf-8", "backslashreplace"))

    def _put(self, path: Path, content: bytes) -> None:
        with self._writing():
            put_in_place(path, content)

    @contextlib.contextmanager
    def _writing(self) -> Any:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.folder} could not be written: {error.strerror or error}. What is finished stays, and nothing "
                "is half written: make room or allow it, and the same command goes on."
            ) from error


def put_in_place(path: Path, content: bytes) -> None:
    """Write a file beside its place, and rename it there when all of it is on the disk."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=_UNFINISHED)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner reads.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _check(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"The output {folder} is a file, and a folder is written. Choose another name.")
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    others = {name for name in there if not name.startswith(_UNFINISHED)} - {_LOCK, VECTORS, BAD_ROWS}
    if others and MANIFEST not in there:
        raise DataError(
            f"The output folder {folder} holds other files, such as {min(others)}. Choose a new or an empty one."
        )


def _short(value: Any) -> str:
    text = "not set" if value is None else json.dumps(value)
    return text if len(text) <= 120 else text[:117] + "..."

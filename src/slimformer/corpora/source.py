"""A corpus of files, Parquet or JSON lines, cut into shards that are the same whenever it is opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet as parquet

from slimformer.errors import DataError

_KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl"}
_EXPECTED = (
    "Expected a .parquet or .jsonl file, a folder or a pattern of such, or an address that fsspec opens, such as "
    "hf://datasets/owner/name/folder"
)
_CHUNK = 2**22


@dataclass(frozen=True)
class Shard:
    """Rows that are read, embedded and written as one.

    Attributes:
        number: From 0, in the order of the corpus.
        first: Its first row's number in the corpus.
        rows: How many.
    """

    number: int
    first: int
    rows: int


@dataclass(frozen=True)
class Part:
    """What is read in one go: a piece of one file, with whole shards in it.

    Attributes:
        path: The file.
        kind: "parquet" or "jsonl".
        shards: The shards, in order.
        start: Of Parquet, rows before the first shard in its row group; of JSON lines, bytes before it.
        groups: Of Parquet, the row groups in which the shards lie.
    """

    path: str
    kind: str
    shards: tuple[Shard, ...]
    start: int
    groups: tuple[int, ...] = ()


@dataclass(frozen=True)
class Corpus:
    """What is embedded.

    Attributes:
        identity: What it is known again by: name, size and SHA-256 of every file, of Parquet of its footer, which tells
            where every column lies, how large it is and what values it has.
        parts: All of it, in order.
        rows: How many.
        text_column: The column with the text.
        id_column: The column with the ids; None where rows are known by their numbers alone.
        id_type: Arrow's type of the ids.
    """

    identity: list[list[Any]]
    parts: tuple[Part, ...]
    rows: int
    text_column: str
    id_column: str | None = None
    id_type: Any = None

    @property
    def shards(self) -> int:
        """How many there are."""
        return sum(len(part.shards) for part in self.parts)


def open_corpus(source: str, text_column: str, id_column: str | None, shard_rows: int) -> Corpus:
    """Look at every file of a corpus, and cut it into shards.

    Of Parquet files the footers are read, JSON lines are read once, to count them.

    Args:
        source: A file, a folder, a pattern, or an address that fsspec opens (`hf://`, `s3://`).
        text_column: The column with the text.
        id_column: The column with the ids.
        shard_rows: Rows of a shard; the last one of a file may have fewer.

    Raises:
        DataError: If there is no such file, it cannot be read, or lacks a column.
    """
    names = (text_column,) if id_column is None else (text_column, id_column)
    identity: list[list[Any]] = []
    parts: list[Part] = []
    shards = row = 0
    id_type: Any = None
    for path in _files(source):
        kind = _kind(path)
        try:
            if kind == "parquet":
                size, digest, groups, found = _look_at_parquet(path, names)
                cut = _cut_parquet(path, groups, shard_rows, shards, row)
            else:
                size, digest, starts, lines = _count_lines(path, shard_rows)
                found = _look_at_lines(path, names)
                cut = _cut_lines(path, starts, lines, shard_rows, shards, row)
        except DataError:
            raise
        # Disks, networks and Parquet share no class of errors.
        except Exception as error:
            raise DataError(
                f"Cannot read {path}: {type(error).__name__}: {error}. Check that the file is there and complete."
            ) from error
        if id_type is not None and found is not None and found != id_type:
            raise DataError(
                f"The ids in {path} are {found}, and those of the files before it {id_type}. Write them as one type."
            )
        id_type = found if found is not None else id_type
        identity.append([os.path.basename(path), size, digest])
        parts += cut
        shards += sum(len(part.shards) for part in cut)
        row += sum(shard.rows for part in cut for shard in part.shards)
    if row == 0:
        raise DataError(f"{source} holds no rows. Give a corpus with texts.")
    return Corpus(identity, tuple(parts), row, text_column, id_column, id_type)


def _files(source: str) -> list[str]:
    """The files of a source, in order."""
    if not source.startswith("hf://") or source.startswith("hf://datasets/"):
        address = source
    else:
        # A dataset is meant: models hold no corpora.
        address = "hf://datasets/" + source.removeprefix("hf://")
    try:
        system, place = fsspec.core.url_to_fs(os.path.expanduser(address))
        patterns = [place]
        if system.isdir(place):
            patterns = [f"{place.rstrip('/')}/**/*{suffix}" for suffix in _KINDS]
        elif not any(sign in place for sign in "*?[") and not system.exists(place):
            raise DataError(f"There is no {source}. {_EXPECTED}.")
        found = sorted({path for pattern in patterns for path in system.glob(pattern)} or {place})
        found = [path for path in found if system.isfile(path)]
    except DataError:
        raise
    # A protocol that is not known or installed, the Hub's clients, and operating systems share no class of errors.
    except Exception as error:
        raise DataError(f"Cannot look at {source}: {type(error).__name__}: {error}. {_EXPECTED}.") from error
    kinds = {_KINDS.get(os.path.splitext(path)[1].lower()) for path in found}
    if not found or kinds == {None}:
        raise DataError(f"{source} is no Parquet file and no JSON lines. {_EXPECTED}.")
    if len(kinds) > 1:
        raise DataError(
            f"{source} holds files of several kinds. Name those of one kind by a pattern, *.parquet."
        )
    return [system.unstrip_protocol(path) for path in found]


def _kind(path: str) -> str:
    return _KINDS[os.path.splitext(path)[1].lower()]


def opened(path: str) -> Any:
    """A file of a corpus, to be read as bytes."""
    return fsspec.open(path, "rb").open()


def _look_at_parquet(path: str, names: Sequence[str]) -> tuple[int, str, list[int], Any]:
    """Size, the footer's SHA-256, rows of every row group, and the type of the ids."""
    with opened(path) as file:
        size = file.seek(0, os.SEEK_END)
        if size < 12:
            raise OSError("it is too short for a Parquet file")
        file.seek(size - 8)
        footer = int.from_bytes(file.read(4), "little") + 8
        file.seek(max(0, size - footer))
        digest = hashlib.sha256(file.read(footer)).hexdigest()
        file.seek(0)
        metadata = parquet.read_metadata(file)
        schema = metadata.schema.to_arrow_schema()
    _check_columns(path, names, schema.names)
    text = schema.field(names[0]).type
    value = text.value_type if pyarrow.types.is_dictionary(text) else text
    if not any(is_of(value) for is_of in _TEXTS):
        raise DataError(
            f"The column {names[0]!r} of {path} holds {text}, and texts are wanted. Name another with --text-column."
        )
    groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    return size, digest, groups, _id_type(schema.field(names[1]).type) if len(names) > 1 else None


def _id_type(of: Any) -> Any:
    """What ids of a type are written as: those that all readers of Parquet know."""
    if pyarrow.types.is_dictionary(of):
        of = of.value_type
    return pyarrow.string() if pyarrow.types.is_string_view(of) else of


_TEXTS = (
    pyarrow.types.is_string,
    pyarrow.types.is_large_string,
    pyarrow.types.is_string_view,
    pyarrow.types.is_binary,
    pyarrow.types.is_large_binary,
    pyarrow.types.is_null,
)


def _check_columns(path: str, names: Sequence[str], there: Sequence[str]) -> None:
    for name, option in zip(names, ("--text-column", "--id-column"), strict=False):
        if name not in there:
            raise DataError(
                f"{path} has no column {name!r}. Its columns: {', '.join(map(repr, there)) or 'none'}. Name one "
                f"with {option}."
            )


def _cut_parquet(path: str, groups: Sequence[int], shard_rows: int, number: int, row: int) -> list[Part]:
    """Parts of one file: shards that begin in the same row group are read together, so that it is decoded once."""
    ends = [sum(groups[: index + 1]) for index in range(len(groups))]
    total = ends[-1] if ends else 0
    begun: dict[int, list[Shard]] = {}
    for first in range(0, total, shard_rows):
        group = next(index for index, end in enumerate(ends) if first < end)
        shard = Shard(number + first // shard_rows, row + first, min(shard_rows, total - first))
        begun.setdefault(group, []).append(shard)
    parts = []
    for group, shards in begun.items():
        last = shards[-1].first - row + shards[-1].rows
        covered = tuple(i for i in range(group, len(groups)) if ends[i] - groups[i] < last)
        start = shards[0].first - row - (ends[group] - groups[group])
        parts.append(Part(path, "parquet", tuple(shards), start, covered))
    return parts


def _count_lines(path: str, shard_rows: int) -> tuple[int, str, list[int], int]:
    """Size, SHA-256, where every shard begins, and how many lines there are."""
    digest = hashlib.sha256()
    starts, lines, place = [0], 0, 0
    ended = True
    with opened(path) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            end = -1
            while (end := chunk.find(b"\n", end + 1)) >= 0:
                lines += 1
                if lines % shard_rows == 0:
                    starts.append(place + end + 1)
            place += len(chunk)
            ended = chunk.endswith(b"\n")
    if not ended:
        lines += 1
    return place, digest.hexdigest(), starts, lines


def _cut_lines(
    path: str, starts: Sequence[int], lines: int, shard_rows: int, number: int, row: int
) -> list[Part]:
    parts = []
    for index, first in enumerate(range(0, lines, shard_rows)):
        shard = Shard(number + index, row + first, min(shard_rows, lines - first))
        parts.append(Part(path, "jsonl", (shard,), starts[index]))
    return parts


def _look_at_lines(path: str, names: Sequence[str]) -> Any:
    """The type of the ids, by the first line that is an object."""
    with opened(path) as file:
        first = next(_objects(file), None)
    if first is None:
        return None
    _check_columns(path, names, list(first))
    if len(names) < 2:
        return None
    whole = isinstance(first[names[1]], int) and not isinstance(first[names[1]], bool)
    return pyarrow.int64() if whole else pyarrow.string()


def _objects(file: Any) -> Iterator[dict[str, Any]]:
    # A corpus whose first lines are broken is read on a little: the others may be whole.
    for _ in range(1000):
        line = file.readline()
        if not line:
            return
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found

"""Read one part of a corpus in a stream, a shard at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet as parquet

from slimformer.corpora.rows import Rows
from slimformer.corpora.source import Corpus, Part, opened
from slimformer.errors import DataError

_ROWS_AT_ONCE = 1024


def read_part(corpus: Corpus, part: Part, wanted: Collection[int]) -> Iterator[Rows]:
    """The rows of those shards of a part that are wanted, in order.

    Args:
        corpus: Of which it is a part.
        part: The part.
        wanted: Numbers of shards.

    Raises:
        DataError: If the file is gone, changed, or cannot be read.
    """
    if not any(shard.number in wanted for shard in part.shards):
        return
    try:
        with opened(part.path) as file:
            values = (
                _parquet_rows(corpus, part, file) if part.kind == "parquet" else _lines(corpus, part, file)
            )
            for shard in part.shards:
                rows = Rows(shard.number, ids=None if corpus.id_column is None else [])
                for number in range(shard.first, shard.first + shard.rows):
                    text, id, why = next(values)
                    rows.add(number, text, id, why)
                if shard.number in wanted:
                    yield rows
    # Disks, networks and Parquet share no class of errors.
    except Exception as error:
        ended = isinstance(error, StopIteration)
        what = "it is shorter than it was" if ended else f"{type(error).__name__}: {error}"
        raise DataError(
            f"Cannot read {part.path}: {what}. Every worker must see the same file at that place."
        ) from error


def shard_tables(
    corpus: Corpus, parts: Sequence[Part], wanted: Collection[int], numbers: Any
) -> Iterator[Any]:
    """The same of the parts of some numbers, each shard as a table of one row: pipelines hand tables on.

    Args:
        corpus: Of which they are parts.
        parts: Parts.
        wanted: Numbers of shards.
        numbers: A table whose column `id` says which of the parts to read.

    Returns:
        Tables of `rows`, pickled, and `error`: what went wrong, else nothing.
    """
    for number in numbers["id"].to_pylist():
        try:
            for rows in read_part(corpus, parts[number], wanted):
                yield pyarrow.table({"rows": [pickle.dumps(rows)], "error": [""]})
        except DataError as error:
            yield pyarrow.table({"rows": [b""], "error": [str(error)]})


def _parquet_rows(corpus: Corpus, part: Part, file: Any) -> Iterator[tuple[Any, Any, str]]:
    columns = [corpus.text_column] + ([] if corpus.id_column is None else [corpus.id_column])
    passed = part.start
    whole = parquet.ParquetFile(file)
    for batch in whole.iter_batches(_ROWS_AT_ONCE, row_groups=list(part.groups), columns=columns):
        if passed >= len(batch):
            passed -= len(batch)
            continue
        batch = batch.slice(passed)
        passed = 0
        texts = as_bytes(batch.column(corpus.text_column)).to_pylist()
        if corpus.id_column is None:
            yield from ((text, None, "") for text in texts)
            continue
        for text, (id, why) in zip(texts, _ids(batch.column(corpus.id_column)), strict=True):
            yield text, id, why


def _ids(column: Any) -> list[tuple[Any, str]]:
    """Ids, and what is wrong with them."""
    try:
        return [(id, "") for id in column.to_pylist()]
    except UnicodeDecodeError:
        contents = as_bytes(column).to_pylist()
        found = [None if content is None else content.decode("utf-8", "replace") for content in contents]
        return [
            (id, "" if id is None or id.encode() == content else "its id is broken UTF-8")
            for id, content in zip(found, contents, strict=True)
        ]


def as_bytes(column: Any) -> Any:
    """A column of text as bytes: Parquet promises UTF-8, and nobody checks it."""
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_null(column.type):
        return column
    large = pyarrow.types.is_large_string(column.type) or pyarrow.types.is_large_binary(column.type)
    return column.cast(pyarrow.large_binary() if large else pyarrow.binary())


def _lines(corpus: Corpus, part: Part, file: Any) -> Iterator[tuple[Any, Any, str]]:
    file.seek(part.start)
    while line := file.readline():
        yield _line(corpus, line)


def _line(corpus: Corpus, line: bytes) -> tuple[Any, Any, str]:
    """Text, id, and what is wrong with a line already."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return None, None, f"broken UTF-8: byte 0x{line[error.start]:02x} behind {error.start} bytes"
    if not text.strip():
        return None, None, "empty"
    try:
        row = json.loads(text)
    except (RecursionError, ValueError) as error:
        return None, None, f"no JSON: {error}"
    if not isinstance(row, dict):
        return None, None, f"no JSON object but {type(row).__name__}"
    id = None if corpus.id_column is None else row.get(corpus.id_column)
    if corpus.text_column not in row:
        return None, id, f"no field {corpus.text_column!r}"
    if corpus.id_column is not None:
        whole = isinstance(id, int) and not isinstance(id, bool)
        fits = whole if pyarrow.types.is_int64(corpus.id_type) else isinstance(id, str)
        if not fits:
            return None, id, f"its id is no {corpus.id_type}"
        if isinstance(id, int) and not -(2**63) <= id < 2**63:
            return None, id, "its id is too large"
    return row[corpus.text_column], id, ""

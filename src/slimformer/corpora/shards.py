"""A shard of vectors as a Parquet file: row numbers, ids, and one list of fixed length per row."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow
import pyarrow.parquet as parquet

from slimformer.corpora.rows import Rows

EMBEDDING = "embedding"
# Of a file's metadata: which run wrote it, and how many rows it leaves out.
_RUN, _BAD = b"slimformer.run", b"slimformer.bad"


def shard_bytes(rows: Rows, vectors: npt.NDArray[Any], id_type: Any, run: str) -> bytes:
    """The content of a shard's file.

    Args:
        rows: What the vectors are of.
        vectors: `[rows, dimension]`.
        id_type: Arrow's type of the ids; None where there are none.
        run: The run that writes it.
    """
    columns: dict[str, Any] = {"row": pyarrow.array(rows.numbers, pyarrow.int64())}
    if id_type is not None:
        columns["id"] = pyarrow.array(rows.ids, id_type)
    columns[EMBEDDING] = fixed_lists(vectors)
    table = pyarrow.table(columns)
    table = table.replace_schema_metadata({_RUN: run.encode(), _BAD: str(len(rows.bad)).encode()})
    content = io.BytesIO()
    # Numbers of vectors are all different: no dictionary holds them, and zstd saves 7% in twice the time.
    compression = {name: "zstd" for name in columns if name != EMBEDDING}
    parquet.write_table(
        table,
        content,
        compression={**compression, f"{EMBEDDING}.list.element": "none"},
        use_dictionary=False,
        write_statistics=["row"],
    )
    return content.getvalue()


def fixed_lists(vectors: npt.NDArray[Any]) -> Any:
    """Vectors `[rows, dimension]` as Arrow keeps lists of one length."""
    flat = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
    return pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])


def vectors_of(table: Any) -> npt.NDArray[Any]:
    """The vectors of a table as `shard_bytes` wrote it, `[rows, dimension]`."""
    column = table.column(EMBEDDING).combine_chunks()
    return np.asarray(column.flatten()).reshape(len(column), column.type.list_size)


def said_by(file: Any) -> tuple[str, int, int]:
    """Which run wrote a shard's file, how many rows are in it, and how many it leaves out.

    Raises:
        OSError, ValueError, KeyError: If it is no such file.
    """
    metadata = parquet.read_metadata(file)
    said = metadata.metadata or {}
    return said[_RUN].decode(), metadata.num_rows, int(said[_BAD])

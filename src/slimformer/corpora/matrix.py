"""All vectors of a finished run as one matrix that index libraries map into memory, with its rows and ids beside it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from slimformer.corpora.output import OutputFolder
from slimformer.corpora.shards import EMBEDDING, vectors_of
from slimformer.errors import DataError

MATRIX, KEYS = "vectors.npy", "keys.parquet"


def write_matrix(output: OutputFolder) -> tuple[Path, Path]:
    """Write the vectors of all shards behind each other, and which row and id each is of.

    Shards are read one at a time.

    Args:
        output: The folder of a run that is finished.

    Returns:
        `vectors.npy`, `[vectors, dimension]`, which `numpy.load(..., mmap_mode="r")` reads as faiss and usearch take
        it, and `keys.parquet`, whose rows say in the same order what the vectors are of.

    Raises:
        DataError: If it cannot be written; there is nothing of it then.
    """
    count = sum(shard.rows for shard in output.finished.values())
    numbers = sorted(output.finished)
    places = output.folder / MATRIX, output.folder / KEYS
    beside = [path.with_name(f".writing-{path.name}") for path in places]
    try:
        schema = parquet.read_schema(output.shard(numbers[0]))
        kind = schema.field(EMBEDDING).type
        head = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(kind.value_type.to_pandas_dtype())),
            "fortran_order": False,
            "shape": (count, kind.list_size),
        }
        keys = schema.remove(schema.get_field_index(EMBEDDING)).remove_metadata()
        with beside[0].open("wb") as matrix, parquet.ParquetWriter(beside[1], keys) as writer:
            np.lib.format.write_array_header_1_0(matrix, head)
            for number in numbers:
                table = parquet.read_table(output.shard(number))
                matrix.write(vectors_of(table).tobytes())
                writer.write_table(table.select(keys.names).replace_schema_metadata())
        for written, path in zip(beside, places, strict=True):
            os.replace(written, path)
    except OSError as error:
        raise DataError(
            f"{places[0]} could not be written: {error.strerror or error}. The shards stay."
        ) from error
    finally:
        for written in beside:
            with contextlib.suppress(FileNotFoundError):
                written.unlink()
    return places

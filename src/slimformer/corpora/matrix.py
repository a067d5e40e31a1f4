"""All vectors of a finished run as one matrix that index libraries map into memory, with its rows and ids beside it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet

from slimformer.corpora.output import OutputFolder
from slimformer.corpora.shards import vectors_of
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
        first = parquet.read_table(output.shard(numbers[0]))
        dimension = first.schema.field("embedding").type.list_size
        dtype = first.schema.field("embedding").type.value_type.to_pandas_dtype()
        matrix = np.lib.format.open_memmap(beside[0], "w+", dtype=dtype, shape=(count, dimension))
        # A hole in the file would be found only when the disk is full and a page of it is written.
        os.posix_fallocate(matrix_file := os.open(beside[0], os.O_RDWR), 0, beside[0].stat().st_size)
        os.close(matrix_file)
        keys = first.schema.remove(first.schema.get_field_index("embedding")).remove_metadata()
        done = 0
        with parquet.ParquetWriter(beside[1], keys) as writer:
            for number in numbers:
                table = parquet.read_table(output.shard(number))
                matrix[done : done + len(table)] = vectors_of(table)
                writer.write_table(table.select(keys.names).replace_schema_metadata())
                done += len(table)
        matrix.flush()
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

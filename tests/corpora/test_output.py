"""The folder of a run: the same run goes on in it, another is refused, and nothing in it is ever half written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest

from slimformer.corpora.matrix import write_matrix
from slimformer.corpora.output import OutputFolder
from slimformer.corpora.rows import BadRow, Rows
from slimformer.corpora.shards import shard_bytes, vectors_of
from slimformer.errors import DataError

RUN: dict[str, Any] = {"input": [["c.parquet", 9, "ab"]], "text_column": "text", "precision": "float32"}


def vectors(first: int, count: int, dtype: Any = np.float32) -> Any:
    return (np.arange(first * 4, (first + count) * 4).reshape(count, 4) % 120).astype(dtype)


def write(folder: OutputFolder, number: int, count: int = 3, bad: int = 0, dtype: Any = np.float32) -> None:
    first = number * 10
    rows = Rows(number, list(range(first, first + count)), ids=[f"d{first + n}" for n in range(count)])
    rows.bad = [BadRow(first + count + n, None, "null") for n in range(bad)]
    content = shard_bytes(rows, vectors(first, count, dtype), pyarrow.string(), folder.run)
    folder.write(number, content, count, rows.bad)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int8])
def test_shards_are_parquet_files_that_others_read(dtype: Any, tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", RUN) as folder:
        write(folder, 0, 3, dtype=dtype)
        write(folder, 2, 2, bad=2, dtype=dtype)
        folder.complete()
    table = parquet.read_table(tmp_path / "out" / "vectors")
    assert table.column("row").to_pylist() == [0, 1, 2, 20, 21]
    assert table.column("id").to_pylist() == ["d0", "d1", "d2", "d20", "d21"]
    kind = pyarrow.list_(pyarrow.from_numpy_dtype(np.dtype(dtype)), 4)
    assert table.schema.field("embedding").type == kind
    expected = np.concatenate([vectors(0, 3, dtype), vectors(20, 2, dtype)])
    assert np.array_equal(vectors_of(table), expected)
    read = datasets.Dataset.from_parquet(
        [str(path) for path in sorted((tmp_path / "out" / "vectors").iterdir())],
        cache_dir=str(tmp_path / "cache"),
    )
    assert np.array_equal(np.asarray(read.with_format("numpy")["embedding"][:]), expected)
    bad = (tmp_path / "out" / "bad_rows" / "part-000002.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in bad] == [22, 23]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["complete"] == {"rows": 5, "bad_rows": 2, "shards": 2}


def test_the_same_run_finds_what_is_finished(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, RUN) as folder:
        write(folder, 1, 3, bad=1)
        folder.same_model("abc", "here")
        folder.keep_ranges([[0.5, -1.0], [1.0, 2.0]])
    # What a run that was killed in the middle of writing leaves.
    (tmp_path / "vectors" / ".writing-x").write_bytes(b"half")
    with OutputFolder(tmp_path, RUN) as folder:
        assert {number: (shard.rows, shard.bad) for number, shard in folder.finished.items()} == {1: (3, 1)}
        assert (folder.rows, folder.bad, folder.model) == (4, 1, "abc")
        assert folder.ranges() == [[0.5, -1.0], [1.0, 2.0]]
        assert [path.name for path in (tmp_path / "vectors").iterdir()] == ["part-000001.parquet"]


def test_a_folder_of_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, RUN) as folder:
        write(folder, 0)
        folder.same_model("abc", "here")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match='another run: text_column was "text" and is "body"') as raised:
        OutputFolder(tmp_path, {**RUN, "text_column": "body"}).__enter__()
    assert "precision" not in str(raised.value)
    with pytest.raises(DataError, match="input was"):
        OutputFolder(tmp_path, {**RUN, "input": []}).__enter__()
    with OutputFolder(tmp_path, RUN) as folder:
        folder.same_model("abc", "there")
        with pytest.raises(DataError, match="The model or plan on there is not the one whose vectors"):
            folder.same_model("abd", "there")
    assert sorted(tmp_path.rglob("*")) == before


def test_shards_of_another_run_are_not_taken_for_ones_own(tmp_path: Path) -> None:
    for name, run in (("one", RUN), ("other", {**RUN, "precision": "int8"})):
        with OutputFolder(tmp_path / name, run) as folder:
            write(folder, 0)
    shutil.copy(tmp_path / "other/vectors/part-000000.parquet", tmp_path / "one/vectors/part-000000.parquet")
    with pytest.raises(DataError, match="written by another run"):
        OutputFolder(tmp_path / "one", RUN).__enter__()


def test_what_is_no_folder_of_a_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="is a file"):
        OutputFolder(tmp_path / "file", RUN).__enter__()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds other files, such as notes\.txt"):
        OutputFolder(tmp_path / "mine", RUN).__enter__()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, RUN) as folder:
        write(folder, 0)
    path = tmp_path / "vectors" / "part-000000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"part-000000\.parquet is damaged"):
        OutputFolder(tmp_path, RUN).__enter__()
    path.write_bytes(whole)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        OutputFolder(tmp_path, RUN).__enter__()
    # A refusal lets go of the folder.
    (tmp_path / "manifest.json").unlink()
    path.unlink()
    with OutputFolder(tmp_path, RUN) as folder:
        assert folder.finished == {}


def test_two_processes_do_not_write_one_folder(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from slimformer.corpora.output import OutputFolder\n"
        "from slimformer.errors import DataError\n"
        "try:\n    OutputFolder(Path(sys.argv[1]), {}).__enter__()\n"
        "except DataError as error:\n    print(error)"
    )
    with OutputFolder(tmp_path, {}):
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)],
            env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert done.stdout.startswith("Another process is writing"), done.stderr


def test_the_matrix_holds_all_vectors_in_order_with_what_they_are_of(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, RUN) as folder:
        for number, count in ((2, 1), (0, 3), (1, 0)):
            write(folder, number, count, bad=1)
        matrix, keys = write_matrix(folder)
    found = np.load(matrix, mmap_mode="r")
    assert (found.dtype, found.shape) == (np.float32, (4, 4))
    assert np.array_equal(found, np.concatenate([vectors(0, 3), vectors(20, 1)]))
    assert parquet.read_table(keys).to_pydict() == {"row": [0, 1, 2, 20], "id": ["d0", "d1", "d2", "d20"]}
    assert not list(tmp_path.glob(".writing*"))


# In a mount of its own, which is gone with the process: shards until the disk is full, and then the matrix.
_PROGRAM = """
import sys
import numpy as np, pyarrow
from pathlib import Path
from slimformer.corpora.matrix import write_matrix
from slimformer.corpora.output import OutputFolder
from slimformer.corpora.rows import BadRow, Rows
from slimformer.corpora.shards import shard_bytes
from slimformer.errors import DataError
drawn = np.random.default_rng(0).normal(size=(500, 64)).astype(np.float32)
place = Path(sys.argv[1]) / "out"
def write(folder, number):
    rows = Rows(number, list(range(500)))
    folder.write(number, shard_bytes(rows, drawn, None, folder.run), 500, [BadRow(0, None, "null")])
def left():
    return sorted(str(path.relative_to(place)) for path in place.rglob("*") if path.is_file() and path.name != ".lock")
with OutputFolder(place, {}) as folder:
    for number in range(6):
        write(folder, number)
    try:
        write_matrix(folder)
    except DataError as error:
        print(error)
    print([path for path in left() if path.startswith((".writing", "vectors.npy", "keys"))])
    try:
        while True:
            number += 1
            write(folder, number)
    except DataError as error:
        print(error)
with OutputFolder(place, {}) as folder:
    print(sorted(folder.finished) == list(range(number)), sum("writing" in path for path in left()))
"""


def test_a_full_disk_is_said_and_leaves_what_is_finished(tmp_path: Path) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no mounts of one's own here")
    # Room for eight shards.
    script = 'mount -t tmpfs -o size=1100k none "$1" && exec "$2" -c "$3" "$1"'
    run = [*alone, "sh", "-c", script, "sh", str(tmp_path), sys.executable, _PROGRAM]
    done = subprocess.run(
        run, env={"PYTHONPATH": ":".join(path for path in sys.path if path), "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    matrix, clean, shard, resumed = done.stdout.strip().splitlines()
    assert "vectors.npy could not be written: No space left on device. The shards stay." in matrix
    assert clean == "[]"
    assert "could not be written: No space left on device. What is finished stays" in shard
    assert resumed == "True 0"

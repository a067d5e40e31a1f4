"""A corpus is cut into the same shards whenever it is opened, and every row is read once, in order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from slimformer.corpora.reading import read_part, shard_tables
from slimformer.corpora.rows import Rows
from slimformer.corpora.source import Corpus, open_corpus
from slimformer.errors import DataError

TEXTS = [f"text {number}" for number in range(23)]


def written(path: Path, first: int = 0, count: int = 23, group: int = 5) -> Path:
    numbers = range(first, first + count)
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": [f"d{n}" for n in numbers], "text": [f"text {n}" for n in numbers]})
        parquet.write_table(table, path, row_group_size=group)
    else:
        path.write_text("\n".join(json.dumps({"id": f"d{n}", "text": f"text {n}"}) for n in numbers))
    return path


def read(corpus: Corpus, wanted: Any = None) -> list[Rows]:
    chosen = range(corpus.shards) if wanted is None else wanted
    return [rows for part in corpus.parts for rows in read_part(corpus, part, chosen)]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("shard_rows", [1, 4, 5, 7, 23, 100])
@pytest.mark.parametrize("group", [1, 5, 23])
def test_every_row_is_read_once_and_in_order(kind: str, shard_rows: int, group: int, tmp_path: Path) -> None:
    corpus = open_corpus(str(written(tmp_path / f"c.{kind}", group=group)), "text", "id", shard_rows)
    assert (corpus.rows, corpus.shards) == (23, -(-23 // shard_rows))
    found = read(corpus)
    assert [rows.shard for rows in found] == list(range(corpus.shards))
    assert [len(rows.numbers) for rows in found[:-1]] == [shard_rows] * (corpus.shards - 1)
    assert [number for rows in found for number in rows.numbers] == list(range(23))
    assert [text for rows in found for text in rows.texts] == TEXTS
    assert [id for rows in found for id in rows.ids or []] == [f"d{number}" for number in range(23)]
    # Those that are left of a run that ended, by themselves.
    chosen = list(range(0, corpus.shards, 2))
    assert read(corpus, chosen) == [found[shard] for shard in chosen]


def test_a_large_row_group_is_one_part_and_small_ones_are_several(tmp_path: Path) -> None:
    def parts(group: int) -> list[list[int]]:
        corpus = open_corpus(str(written(tmp_path / f"{group}.parquet", group=group)), "text", None, 4)
        return [[shard.number for shard in part.shards] for part in corpus.parts]

    assert parts(23) == [[0, 1, 2, 3, 4, 5]]
    assert parts(10) == [[0, 1, 2], [3, 4], [5]]
    assert parts(1) == [[0], [1], [2], [3], [4], [5]]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_files_of_a_folder_or_pattern_follow_each_other_by_name(kind: str, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    written(tmp_path / "inner" / f"b.{kind}", 10, 13)
    written(tmp_path / f"a.{kind}", 0, 10)
    (tmp_path / "notes.txt").write_text("no corpus")
    for source in (str(tmp_path), f"{tmp_path}/**/*.{kind}", f"file://{tmp_path}"):
        corpus = open_corpus(source, "text", "id", 4)
        assert [name for name, _, _ in corpus.identity] == [f"a.{kind}", f"b.{kind}"]
        # Shards end where files do.
        assert [len(rows.texts) for rows in read(corpus)] == [4, 4, 2, 4, 4, 4, 1]
        assert [text for rows in read(corpus) for text in rows.texts] == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_corpus_is_known_again_by_its_content(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path / f"c.{kind}")
    corpus = open_corpus(str(path), "text", "id", 4)
    again = open_corpus(str(written(tmp_path / f"c.{kind}")), "text", "id", 4)
    assert (again.identity, again.parts) == (corpus.identity, corpus.parts)
    assert open_corpus(str(written(path, count=22)), "text", "id", 4).identity != corpus.identity
    assert open_corpus(str(written(path, first=1)), "text", "id", 4).identity != corpus.identity


@pytest.mark.parametrize("end", ["", "\n"])
def test_the_last_line_may_end_or_not(end: str, tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\r\n{"text": "b"}' + end)
    assert [rows.texts for rows in read(open_corpus(str(path), "text", None, 1))] == [["a"], ["b"]]


def test_what_cannot_be_a_corpus_is_refused_with_what_is_wrong(tmp_path: Path) -> None:
    table = written(tmp_path / "c.parquet")
    lines = written(tmp_path / "c.jsonl")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no footer")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "c.txt").write_text("text")
    (tmp_path / "nothing").mkdir()
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")

    def refused(source: Any, text: str = "text", id: str | None = None) -> str:
        with pytest.raises(DataError) as raised:
            open_corpus(str(source), text, id, 4)
        return str(raised.value)

    for path in (table, lines):
        assert "no column 'body'. Its columns: 'id', 'text'. Name one with --text-column" in refused(
            path, "body"
        )
        assert "no column 'key'" in refused(path, id="key")
        assert "--id-column" in refused(path, id="key")
    assert "holds int64, and texts are wanted" in refused(tmp_path / "numbers.parquet")
    assert "Check that the file is there and complete" in refused(tmp_path / "broken.parquet")
    assert "holds no rows" in refused(tmp_path / "empty.jsonl")
    assert "There is no" in refused(tmp_path / "absent.parquet")
    assert "no Parquet file and no JSON lines" in refused(tmp_path / "c.txt")
    assert "no Parquet file and no JSON lines" in refused(tmp_path / "nothing")
    assert "several kinds" in refused(tmp_path / "*")
    assert "Cannot look at nowhere://corpus" in refused("nowhere://corpus")


def test_a_file_that_is_gone_or_shorter_is_said_where_it_is_read(tmp_path: Path) -> None:
    for path in (tmp_path / "c.parquet", tmp_path / "c.jsonl"):
        corpus = open_corpus(str(written(path)), "text", None, 4)
        written(path, count=9)
        with pytest.raises(DataError, match=r"Cannot read .*Every worker must see the same file"):
            read(corpus)
        path.unlink()
        numbers = pyarrow.table({"id": [0]})
        [table] = shard_tables(corpus, corpus.parts, range(corpus.shards), numbers)
        assert "Every worker must see the same file" in table["error"][0].as_py()

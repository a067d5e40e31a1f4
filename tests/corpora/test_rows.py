"""Rows that cannot be embedded are told from others, with a reason; batches hold so many tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slimformer.corpora.reading import read_part
from slimformer.corpora.rows import BadRow, Rows, token_batches
from slimformer.corpora.source import open_corpus

BROKEN = b"caf\xe9 au lait"
_UTF8 = "broken UTF-8: byte 0xe9 behind 3 bytes"


def rows_of(path: Path, id_column: str | None = "id") -> Rows:
    corpus = open_corpus(str(path), "text", id_column, 100)
    [found] = read_part(corpus, corpus.parts[0], {0})
    return found


def as_text(contents: list[bytes | None], of: Any) -> Any:
    """Bytes as a column of text that nobody has checked, as writers of other languages make it."""
    binary = pyarrow.large_binary() if of == pyarrow.large_string() else pyarrow.binary()
    column = pyarrow.array(contents, binary)
    return pyarrow.Array.from_buffers(of, len(column), column.buffers(), column.null_count)


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.binary()])
def test_bad_rows_of_parquet_are_named(kind: Any, tmp_path: Path) -> None:
    contents = [b"a cat", None, BROKEN, b"", b" \n", "é".encode()]
    column = pyarrow.array(contents, kind) if kind == pyarrow.binary() else as_text(contents, kind)
    parquet.write_table(pyarrow.table({"id": list(range(10, 16)), "text": column}), tmp_path / "c.parquet")
    found = rows_of(tmp_path / "c.parquet")
    assert (found.numbers, found.texts, found.ids) == ([0, 5], ["a cat", "é"], [10, 15])
    assert found.bad == [
        BadRow(1, 11, "null"),
        BadRow(2, 12, _UTF8),
        BadRow(3, 13, "empty"),
        BadRow(4, 14, "empty"),
    ]


def test_columns_of_every_kind_of_text_are_read(tmp_path: Path) -> None:
    words = ["a cat", "a dog", None, "a cat"]
    for kind in (pyarrow.dictionary(pyarrow.int32(), pyarrow.string()), pyarrow.string_view()):
        column = pyarrow.array(words, pyarrow.string()).cast(kind)
        if kind == pyarrow.string_view():
            column = column.cast(pyarrow.string())
        parquet.write_table(pyarrow.table({"id": column, "text": column}), tmp_path / "c.parquet")
        found = rows_of(tmp_path / "c.parquet")
        assert found.texts == ["a cat", "a dog", "a cat"]
        assert found.ids == found.texts
        assert [bad.reason for bad in found.bad] == ["null"]
    parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2)}), tmp_path / "c.parquet")
    assert [bad.reason for bad in rows_of(tmp_path / "c.parquet", None).bad] == ["null"] * 2


def test_an_id_that_is_no_text_makes_its_row_bad(tmp_path: Path) -> None:
    ids = as_text([b"d0", BROKEN, None], pyarrow.string())
    parquet.write_table(pyarrow.table({"id": ids, "text": ["a", "b", "c"]}), tmp_path / "c.parquet")
    found = rows_of(tmp_path / "c.parquet")
    assert found.ids == ["d0", None]
    [bad] = found.bad
    assert (bad.row, bad.reason) == (1, "its id is broken UTF-8")


def test_bad_rows_of_json_lines_are_named(tmp_path: Path) -> None:
    lines = [
        b'{"id": "d0", "text": "a cat"}', b'{"id": "d1", "text": null}', b'{"id": "d2", "text": 7}',
        b'{"id": "d3", "text": "' + BROKEN + b'"}', b'{"id": "d4"}', b'["a"]', b'{"id": "d6", "te', b"",
        b'{"id": "d8", "text": "\\ud800"}', b'{"id": 9, "text": "a"}', b'{"id": "d10", "text": ["a"]}',
        b'{"id": "d11", "text": "a dog"}',
    ]  # fmt: skip
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    found = rows_of(tmp_path / "c.jsonl")
    assert (found.numbers, found.texts, found.ids) == ([0, 11], ["a cat", "a dog"], ["d0", "d11"])
    reasons = {bad.row: bad.reason for bad in found.bad}
    assert reasons[6].startswith("no JSON: ")
    assert {row: reason for row, reason in reasons.items() if row != 6} == {
        1: "null", 2: "no text but int", 3: "broken UTF-8: byte 0xe9 behind 25 bytes", 4: "no field 'text'",
        5: "no JSON object but list", 7: "empty", 8: "broken UTF-8: half of a surrogate pair",
        9: "its id is no string", 10: "no text but list",
    }  # fmt: skip
    assert [bad.id for bad in found.bad if bad.row in (1, 3, 9)] == ["d1", None, 9]


def test_ids_of_json_lines_may_be_whole_numbers(tmp_path: Path) -> None:
    lines = [
        {"id": 3, "text": "a"},
        {"id": "4", "text": "b"},
        {"id": 2**70, "text": "c"},
        {"id": True, "text": "d"},
    ]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = rows_of(tmp_path / "c.jsonl")
    assert found.ids == [3]
    assert [bad.reason for bad in found.bad] == [
        "its id is no int64",
        "its id is too large",
        "its id is no int64",
    ]


def test_rows_that_turn_out_bad_later_stand_among_the_others() -> None:
    rows = Rows(0, [0, 2, 3], ["a", "b", "c"], ["d0", "d2", "d3"], [BadRow(1, "d1", "null")])
    left = rows.without({1: "gives no token"})
    assert (left.numbers, left.texts, left.ids) == ([0, 3], ["a", "c"], ["d0", "d3"])
    assert left.bad == [BadRow(1, "d1", "null"), BadRow(2, "d2", "gives no token")]


@given(st.lists(st.integers(1, 60)), st.integers(1, 100))
def test_batches_hold_every_text_once_and_no_more_tokens_than_they_may(
    lengths: list[int], budget: int
) -> None:
    batches = list(token_batches(lengths, budget))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[place] for place in batch)
        assert len(batch) == 1 or len(batch) * longest <= budget
    # Longest first, so that what does not fit into memory is known at once.
    in_order = [lengths[place] for batch in batches for place in batch]
    assert in_order == sorted(lengths, reverse=True)

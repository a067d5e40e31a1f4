"""Text from every kind of source becomes the same blocks for the same seed, and what cannot be read says why."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import BertTokenizer

from slimformer.errors import DataError
from slimformer.text.sources import characters_for, load_texts, token_batches_padded, token_blocks
from tiny_checkpoints import tiny_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"]
TEXTS = ["First.", "Second\nline.", "Third: ä."]
ROWS = [{"text": text, "title": f"t{i}"} for i, text in enumerate(TEXTS)]


def tokenizer() -> BertTokenizer:
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def characters(text: str, **options: object) -> dict[str, list[int]]:
    return {"input_ids": [ord(character) for character in text]}


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow as arrow  # noqa: PLC0415
    import pyarrow.parquet as parquet  # noqa: PLC0415

    parquet.write_table(arrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.jsonl", "a.json", "a.parquet", "-", "list", "generator"]
)
def test_every_source_gives_the_same_texts_and_hash(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, blank = tmp_path / name, "\r\n \n\n".join(TEXTS) + "\n"
    source: object = path
    if name == "-":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(blank.encode()), encoding="utf-8"))
        source = "-"
    elif name in ("list", "generator"):
        source = [*TEXTS, " \n"] if name == "list" else (text for text in TEXTS)
    elif name == "a.parquet":
        write_parquet(path, ROWS)
    elif path.suffix.lower() == ".txt":
        # The mark that Windows editors put in front is no part of the text.
        path.write_bytes(blank.encode("utf-8-sig"))
    else:
        write_jsonl(path, ROWS)
    texts, provenance = load_texts(source)
    assert [text.strip() for text in texts] == TEXTS
    expected = load_texts(TEXTS)[1].removeprefix("a Python list")
    labels = {"-": "standard input", "list": "a Python list", "generator": "a Python generator"}
    assert provenance == labels.get(name, f"file {name}") + expected
    assert str(tmp_path) not in provenance


def test_without_a_blank_line_every_line_is_a_text(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_text("one\ntwo\nthree\n")
    assert load_texts(str(path))[0] == ["one", "two", "three"]
    assert load_texts(path, limit=2)[0] == ["one", "two"]


def test_none_reads_the_python_reference_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="slimformer"):
        texts, provenance = load_texts(None)
    assert sum(map(len, texts)) > 100_000
    assert provenance.startswith(f"pydoc_data.topics of Python {sys.version_info.major}.")
    assert "your own application" in caplog.text
    assert load_texts(None)[1] == provenance


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_text_field_names_the_column(write: Callable[[Path, list], Path], tmp_path: Path) -> None:
    path = write(tmp_path / f"a.{write.__name__.removeprefix('write_')}", ROWS)
    assert load_texts(path, text_field="title")[0] == ["t0", "t1", "t2"]
    with pytest.raises(DataError, match=r"has no field 'body'. Its fields: 'text', 'title'"):
        load_texts(path, text_field="body")


def test_a_dataset_is_streamed_and_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # `datasets` reads a folder of the working directory under the same kind of name as one of the Hub.
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "owner" / "name" / "train.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    texts, provenance = load_texts("owner/name:default", limit=2)
    assert texts == TEXTS[:2]
    assert provenance.startswith("Hub dataset owner/name:default, 2 texts")


@pytest.mark.parametrize(("source", "message"), [
    ("absent.txt", "absent.txt does not exist"),
    (Path("absent"), "The file absent does not exist"),
    (".", "is a folder"),
    ("notes.md", "kind that is not read (.md)"),
    ("plain", "kind that is not read (no suffix)"),
    ("empty.txt", "file empty.txt holds no text"),
    ("latin.txt", "as UTF-8 text"),
    ("broken.jsonl", "Line 2 of broken.jsonl is not JSON"),
    ("array.json", "Line 1 of array.json holds a value of type list"),
    ("number.jsonl", "has a value of type int in the field 'text'"),
    ("null.jsonl", "has None in the field 'text'"),
    ("fake.parquet", "as Parquet"),
    ("late.txt", "late.txt as UTF-8 text: line 5001 has the byte 0xe4 behind 3 characters"),
    ("late.jsonl", "late.jsonl as UTF-8 text: line 3 has the byte 0xff behind 10 characters"),
    ("windows.txt", "windows.txt as UTF-8 text: it begins as UTF-16 or UTF-32 does"),
    ("unmarked.txt", "unmarked.txt as UTF-8 text: it begins as UTF-16 or UTF-32 does"),
    ("half.jsonl", r"Line 2 of half.jsonl holds '\ud83d', half of a surrogate pair, behind 2 characters"),
    (["fine", "a \ude00"], r"Item 1 holds '\ude00', half of a surrogate pair"),
    ("deep.jsonl", "Line 1 of deep.jsonl is not JSON"),
    ("What is this text doing here?", "neither a file nor the id of a Hub dataset"),
    ("x" * 200 + "!", "..."),
    ([], "list holds no text"),
    ([" ", "\n"], "list holds no text"),
    (["a", 3], "item 1 is a value of type int"),
    (b"bytes", "Cannot read texts from a value of type bytes"),
    ({"a": "b"}, "Cannot read texts from a value of type dict"),
    (7, "Cannot read texts from a value of type int"),
], ids=lambda value: str(value)[:20])  # fmt: skip
def test_a_bad_source_says_what_is_wrong(
    source: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "notes.md": b"text", "plain": b"text", "empty.txt": b" \n\n ", "latin.txt": "ä".encode("latin-1"),
        "broken.jsonl": b'{"text": "a"}\n{"text": \n', "array.json": b'["a"]', "number.jsonl": b'{"text": 1}',
        "late.txt": b"good\n" * 5000 + b"sp\xc3\xa4\xe4t\n", "unmarked.txt": "text\n".encode("utf-16-le"),
        "late.jsonl": b'{"text": "a"}\n\n{"text": "\xff"}\n', "windows.txt": "text\n".encode("utf-16"),
        "half.jsonl": b'{"text": "a"}\n{"text": "a \\ud83d"}\n', "deep.jsonl": b"[" * 100_000,
        "null.jsonl": b'{"text": null}', "fake.parquet": b"PAR1 and nothing behind",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        load_texts(source)
    assert message in str(error.value)


def test_bad_bytes_on_standard_input_are_named_by_their_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for content, message in (
        (b"one\n\ntw\xe4o\n", "line 3 has the byte 0xe4"),
        ("a".encode("utf-16"), "UTF-16"),
    ):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
        with pytest.raises(DataError, match=f"Cannot read standard input as UTF-8 text: .*{message}"):
            load_texts("-")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("sp\u00e4t".encode()), encoding="ascii"))
    assert load_texts("-")[0] == ["sp\u00e4t"]


@pytest.mark.parametrize("kind", ["iterator", "blank iterator", "jsonl", "text", "standard input"])
def test_no_more_is_read_than_is_enough(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"jsonl": '{"text": "A line of text."}\n'}.get(kind, "A line of text.\n\n") * 200_000
    (tmp_path / f"a.{'jsonl' if kind == 'jsonl' else 'txt'}").write_text(lines + "\n{")
    source: object = next(tmp_path.iterdir())
    read = []
    if kind.endswith("iterator"):
        source = (
            read.append(i) or (" " if kind == "blank iterator" else "A line of text.")
            for i in itertools.count()
        )
    elif kind == "standard input":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8"))
        source = "-"
    if kind == "blank iterator":
        with pytest.raises(DataError, match="every entry was blank"):
            load_texts(source, enough=1000)
        assert len(read) == 500
        return
    assert len(load_texts(source, enough=1000)[0]) == 63
    assert len(load_texts(["x" * 400] * 9, enough=1000)[0]) == 5
    assert characters_for(10**6) == 80 * 10**6


def test_every_block_begins_as_the_tokenizer_begins_texts() -> None:
    tokens = tiny_tokenizer()
    tokens._tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    blocks = token_blocks(["a cat sat"] * 9, tokens, sequence_length=6, count=4, seed=0)
    assert blocks.shape == (4, 6)
    assert (blocks[:, 0] == 1).all()
    assert not torch.isin(blocks[:, 1:], torch.tensor([1, 2])).any()
    with pytest.raises(DataError, match="sequence_length must be above 1"):
        token_blocks(["a cat sat"], tokens, sequence_length=1, count=4, seed=0)
    assert (
        token_blocks(["a cat sat"] * 9, tiny_tokenizer(), sequence_length=6, count=9, seed=0)[:, 0] != 1
    ).all()


def test_a_missing_dataset_and_a_missing_package_name_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = importlib.import_module("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"Cannot read 'owner/absent'.*Check the name, the config"):
        load_texts("owner/absent")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r'pip install "slimformer\[data\]"'):
        load_texts("owner/absent")


def test_a_limit_below_one_is_refused() -> None:
    with pytest.raises(DataError, match="limit must be at least 1, got 0"):
        load_texts(TEXTS, limit=0)


def test_blocks_are_cut_from_the_text_without_overlap() -> None:
    texts = [chr(0x4E00 + i) * 5 for i in range(40)]
    stream = torch.tensor([ord(character) for text in texts for character in text + "\n\n"])
    blocks = token_blocks(texts, characters, sequence_length=8, count=100, seed=0)
    assert torch.equal(blocks.flatten(), stream[: blocks.numel()])
    assert blocks.shape == (35, 8)
    assert blocks.dtype == torch.long
    # Numbering the tokens shows that no token is in two of the chosen blocks.
    numbered = iter(range(10_000))
    chosen = token_blocks(
        texts,
        lambda text, **_: {"input_ids": [next(numbered) for _ in text] if text != "a" else [0]},
        sequence_length=8,
        count=9,
        seed=3,
    ).flatten()
    assert len(chosen.unique()) == len(chosen) == 72
    assert torch.equal(chosen, chosen.sort().values)


def test_the_seed_decides_which_blocks_and_rows() -> None:
    texts = [chr(0x4E00 + i) * 6 for i in range(400)]

    def blocks(seed: int) -> torch.Tensor:
        return token_blocks(texts, characters, sequence_length=8, count=10, seed=seed)

    assert torch.equal(blocks(1), blocks(1))
    assert not torch.equal(blocks(1), blocks(2))
    state = torch.get_rng_state()
    blocks(1)
    assert torch.equal(torch.get_rng_state(), state)
    rows = [" ".join(["one"] * n) for n in range(1, 20)]

    def lengths(seed: int) -> list[int]:
        batch = token_batches_padded(rows, tokenizer(), max_length=64, count=5, seed=seed)
        return batch["attention_mask"].sum(-1).tolist()

    assert lengths(1) == lengths(1) == sorted(lengths(1))
    assert lengths(1) != lengths(2)


def test_reading_stops_where_there_is_enough() -> None:
    read = []

    def counted(text: str, **options: object) -> dict[str, list[int]]:
        read.append(text)
        return {"input_ids": [1] * 10}

    token_blocks(["text"] * 100, counted, sequence_length=5, count=2, seed=0)
    assert read.count("text\n\n") == 4


def test_rows_are_padded_truncated_and_have_special_tokens() -> None:
    batch = token_batches_padded(["one", " ", "one two three"], tokenizer(), max_length=4, count=9, seed=0)
    assert batch["input_ids"].tolist() == [[2, 5, 3, 0], [2, 5, 6, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert sorted(batch) == ["attention_mask", "input_ids"]


@pytest.mark.parametrize(("texts", "change", "message"), [
    (["abc"], {"sequence_length": 8}, "gives 5 tokens, and one block needs 8"),
    ([], {}, "gives 0 tokens"),
    (["abc"], {"sequence_length": 0}, "sequence_length must be at least 1, got 0"),
    (["abc"], {"count": -1}, "count must be at least 1, got -1"),
    ("abc", {}, "Expected a list of strings"),
    ((["abc"], "a Python list, 1 text"), {}, "Expected a list of strings"),
])  # fmt: skip
def test_blocks_that_cannot_be_made_are_refused(texts: object, change: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        token_blocks(texts, characters, **{"sequence_length": 2, "count": 1, "seed": 0, **change})


@pytest.mark.parametrize(("texts", "change", "message"), [
    ([], {}, "Got 0 texts"),
    (["", " "], {}, "Got 2 texts, none with anything in it"),
    (["one"], {"max_length": 0}, "max_length must be at least 1, got 0"),
    (["one"], {"count": 0}, "count must be at least 1, got 0"),
    ("one", {}, "Expected a list of strings"),
])  # fmt: skip
def test_rows_that_cannot_be_made_are_refused(texts: object, change: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        token_batches_padded(texts, tokenizer(), **{"max_length": 8, "count": 1, "seed": 0, **change})


def test_a_tokenizer_without_padding_is_refused() -> None:
    bare = tokenizer()
    bare.pad_token = None
    with pytest.raises(DataError, match=r"Set tokenizer\.pad_token"):
        token_batches_padded(["one"], bare, max_length=8, count=1, seed=0)


def test_importing_reads_no_optional_package() -> None:
    code = (
        "import sys, slimformer, slimformer.text.sources, slimformer.evaluation.quality;"
        "import slimformer.evaluation.timing.speed;"
        "print([name for name in ('datasets', 'pyarrow', 'sentence_transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

"""Where calibration text comes from, and how it becomes blocks or batches of tokens."""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from slimformer.errors import DataError
from slimformer.text.files import checked_text, lines_of, paragraphs, typed_lines

_logger = logging.getLogger("slimformer")
_HUB_ROWS = 2000
# Blocks are chosen from more text than they need, so that another seed gives other blocks.
_SURPLUS = 4
_SEPARATOR = "\n\n"
# No text has more characters per token than this, taken over pages; English has four to five.
_CHARACTERS = 16
# So many characters are read in a moment, and texts are chosen from more of a source.
_LEAST_READ = 2**22
# Fewer texts than this are split apart where some are held out, and more of them are not: see held_out.py.
_FEWEST = 5
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
_EXPECTED = (
    "Expected a .txt, .jsonl, .json or .parquet file, '-' for standard input, "
    "the id of a Hub dataset (owner/name or owner/name:config), a list of strings, or None"
)


def load_texts(
    source: str | Path | Iterable[str] | None,
    *,
    text_field: str = "text",
    limit: int | None = None,
    enough: int | None = None,
) -> tuple[list[str], str]:
    """Read texts, and say where they came from. Blank texts are left out.

    Args:
        source: None reads the language reference that every CPython carries (`pydoc_data.topics`): enough to try
            things out offline, but text like that of your own application calibrates better. "-" reads
            standard input. A `.txt` file (and standard input) holds paragraphs separated by blank lines or, where
            there is no blank line, one text per line. A `.jsonl` or `.json` file holds one object per line. A
            `.parquet` file and Hub datasets need the extra `data`; a dataset id ("owner/name" or
            "owner/name:config") streams the split `train`. Any other iterable of strings is taken as it is.
        text_field: The field or column with the text, for JSON lines, Parquet and the Hub.
        limit: Take at most so many texts. None takes all, or 2000 rows of a Hub dataset.
        enough: Read no further once there are so many characters, in five texts at least; `characters_for` says how
            many some number of tokens takes. None reads to the end, which an endless iterator does not have.

    Returns:
        The texts, and a line for a plan's provenance that ends in the first 16 hex digits of a SHA-256 over them.

    Raises:
        DataError: If the source is of another kind, does not exist, cannot be read, holds no text or lacks the
            field, or if `limit` is below 1.

    Example:
        >>> load_texts(["One text.", "", "Another."])
        (['One text.', 'Another.'], 'a Python list, 2 texts, sha256 b589d87aa501d95d')
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit must be at least 1, got {limit}. Leave it out to read everything.")
    name, found = _open(source, text_field, limit)
    texts = list(islice(_not_blank(found, enough), limit))
    if not texts:
        raise DataError(
            f"{name} holds no text: every entry was blank or there was none. Give a source with text."
        )
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8") + b"\0")
    plural = "" if len(texts) == 1 else "s"
    return texts, f"{name}, {len(texts)} text{plural}, sha256 {digest.hexdigest()[:16]}"


def characters_for(tokens: int) -> int:
    """After how many characters of a source no more need be read for so many tokens.

    There are enough for four times as many, from which some are chosen, where every fifth text is held out.
    """
    return max(tokens * _SURPLUS * _CHARACTERS * _FEWEST // (_FEWEST - 1), _LEAST_READ)


def check_token_ids(ids: Tensor, model: PreTrainedModel) -> None:
    """Refuse ids that the model has no embedding for; on a GPU they would end the process.

    Raises:
        DataError: If there are any.
    """
    lowest, highest = ids.aminmax()
    size = model.get_input_embeddings().num_embeddings
    if lowest < 0 or highest >= size:
        raise DataError(
            f"The blocks hold token ids from {int(lowest)} to {int(highest)}, and the model knows 0 to {size - 1}. "
            "Use the model's own tokenizer."
        )


def token_blocks(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, sequence_length: int, count: int, seed: int
) -> Tensor:
    """Blocks of consecutive tokens for a decoder, without padding, each behind what the tokenizer puts before a text.

    Every text is tokenised with a blank line behind it; their tokens, one text after the other, are cut into blocks
    that do not overlap, and `count` of these are chosen by `seed`, in the order of the text. Reading stops at four
    times the tokens needed. Where the tokenizer begins texts with a token (Gemma's and Llama's `<bos>`), every block
    begins with it: without, such models predict next to nothing.

    Args:
        texts: Texts, as `load_texts` returns them.
        tokenizer: The model's tokenizer.
        sequence_length: Tokens per block, those that begin it included.
        count: Blocks wanted; all there are when the text gives fewer.
        seed: Which blocks are chosen.

    Returns:
        Token ids `[blocks, sequence_length]`, int64, on the CPU.

    Raises:
        DataError: If the text gives less than one block, a size is below 1, or `texts` is not a list of strings.

    Example:
        >>> def characters(text, **options):
        ...     return {"input_ids": [ord(c) for c in text]}
        >>> token_blocks(["abc", "def"], characters, sequence_length=4, count=9, seed=0)
        tensor([[ 97,  98,  99,  10],
                [ 10, 100, 101, 102]])
    """
    _check(texts, sequence_length=sequence_length, count=count)
    front = tokens_in_front(tokenizer)
    length = sequence_length - len(front)
    if length < 1:
        raise DataError(
            f"sequence_length must be above {len(front)}, since the tokenizer begins every text with so many tokens; "
            f"got {sequence_length}."
        )
    needed = length * count
    ids: list[int] = []
    for text in texts:
        # verbose=False: a text longer than the model's context is no mistake here, since it is cut afterwards.
        encoded = tokenizer(text + _SEPARATOR, add_special_tokens=False, truncation=False, verbose=False)
        ids.extend(encoded["input_ids"])
        if len(ids) >= _SURPLUS * needed:
            break
    blocks = len(ids) // length
    if blocks == 0:
        raise DataError(
            f"The text gives {len(ids)} tokens, and one block needs {length}. "
            "Give more text or a smaller sequence_length."
        )
    tokens = torch.tensor(ids[: blocks * length], dtype=torch.long).view(blocks, length)
    chosen = tokens[_choose(blocks, count, seed)]
    return torch.cat([torch.tensor(front, dtype=torch.long).expand(len(chosen), -1), chosen], 1)


def token_batches_padded(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int, count: int, seed: int
) -> dict[str, Tensor]:
    """Texts for an encoder: one row each, with the tokenizer's special tokens, truncated and padded.

    Args:
        texts: Texts, as `load_texts` returns them.
        tokenizer: The model's tokenizer; it must have a padding token.
        max_length: Most tokens per row.
        count: Rows wanted; all texts when there are fewer.
        seed: Which texts are chosen; their order stays.

    Returns:
        `input_ids` and `attention_mask`, each `[rows, tokens]`, int64, on the CPU.

    Raises:
        DataError: If there is no text, a size is below 1, `texts` is not a list of strings, or the tokenizer has no
            padding token.

    Example:
        >>> from transformers import BertTokenizer
        >>> words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two"]
        >>> tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
        >>> batch = token_batches_padded(["One", "one two"], tokenizer, max_length=8, count=2, seed=0)
        >>> batch["input_ids"].tolist()
        [[2, 5, 3, 0], [2, 5, 6, 3]]
    """
    _check(texts, max_length=max_length, count=count)
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise DataError(f"Got {len(texts)} texts, none with anything in it. Give at least one text.")
    if tokenizer.pad_token_id is None:
        raise DataError(
            "The tokenizer has no padding token, and rows of different lengths need one. "
            "Set tokenizer.pad_token, for instance to tokenizer.eos_token."
        )
    chosen = [kept[index] for index in _choose(len(kept), count, seed).tolist()]
    batch = tokenizer(chosen, truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def _not_blank(found: Iterator[str], enough: int | None) -> Iterator[str]:
    read = blank = count = 0
    for text in found:
        read += len(text) + 1
        if text.strip():
            count += 1
            yield text
        else:
            blank += len(text) + 1
        if enough is not None and read >= enough and (count >= _FEWEST or blank >= enough):
            return


def tokens_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that a tokenizer puts before a text."""
    plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    start = next((start for start in starts if whole[start : start + len(plain)] == plain), 0)
    return list(whole[:start])


def _open(
    source: str | Path | Iterable[str] | None, text_field: str, limit: int | None
) -> tuple[str, Iterator[str]]:
    """A name for the source, and its texts."""
    if source is None:
        _logger.info(
            "No text was given: using the Python language reference (pydoc_data.topics). "
            "Text like that of your own application calibrates better."
        )
        return (
            f"pydoc_data.topics of Python {sys.version_info.major}.{sys.version_info.minor}",
            _python_topics(),
        )
    if isinstance(source, (str, Path)):
        if source == "-":
            return "standard input", paragraphs(typed_lines())
        return _open_path_or_dataset(source, text_field, limit)
    if isinstance(source, (bytes, Mapping)) or not isinstance(source, Iterable):
        raise DataError(f"Cannot read texts from {_kind(source)}. {_EXPECTED}.")
    return f"a Python {type(source).__name__}", _strings(source)


def _open_path_or_dataset(
    source: str | Path, text_field: str, limit: int | None
) -> tuple[str, Iterator[str]]:
    path = os.path.expanduser(source)
    suffix = os.path.splitext(path)[1].lower()
    readers: dict[str, Callable[[Path], Iterator[str]]] = {
        ".txt": lambda file: paragraphs(lines_of(file)),
        ".jsonl": lambda file: _json_lines(file, text_field),
        ".json": lambda file: _json_lines(file, text_field),
        ".parquet": lambda file: _parquet_rows(file, text_field),
    }
    if os.path.isfile(path):
        if suffix not in readers:
            raise DataError(f"{path} is of a kind that is not read ({suffix or 'no suffix'}). {_EXPECTED}.")
        # Only the name: plans are published, and folders say more about a machine than about the text.
        return f"file {os.path.basename(path)}", readers[suffix](Path(path))
    if isinstance(source, Path) or suffix in readers or os.path.exists(path):
        found = "is a folder" if os.path.isdir(path) else "does not exist"
        raise DataError(f"The file {path} {found}. {_EXPECTED}.")
    if not _HUB_ID.fullmatch(source):
        shown = source if len(source) <= 80 else source[:77] + "..."
        raise DataError(f"{shown!r} is neither a file nor the id of a Hub dataset. {_EXPECTED}.")
    return f"Hub dataset {source}", _hub_rows(source, text_field, _HUB_ROWS if limit is None else limit)


def _python_topics() -> Iterator[str]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for _, text in sorted(topics.items()):
        yield text


def _strings(source: Iterable[Any]) -> Iterator[str]:
    for index, text in enumerate(source):
        if not isinstance(text, str):
            raise DataError(f"Expected strings, and item {index} is {_kind(text)}. Give an iterable of str.")
        yield checked_text(text, f"Item {index}")


def _json_lines(path: Path, text_field: str) -> Iterator[str]:
    for number, line in enumerate(lines_of(path), start=1):
        if not line.strip():
            continue
        where = f"Line {number} of {path}"
        try:
            row = json.loads(line)
        except (RecursionError, ValueError) as error:
            raise DataError(f"{where} is not JSON ({error}). Expected one JSON object per line.") from error
        if not isinstance(row, dict):
            raise DataError(f"{where} holds {_kind(row)}. Expected one JSON object per line.")
        yield _field(row, text_field, where)


def _parquet_rows(path: Path, text_field: str) -> Iterator[str]:
    parquet = _optional("pyarrow.parquet", "Parquet files")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"Cannot read {path} as Parquet: {error}. Check that the file is complete."
        ) from error
    with file:
        names = file.schema_arrow.names
        columns = [text_field] if text_field in names else names
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                yield _field(row, text_field, f"Row {number} of {path}")
                number += 1


def _hub_rows(source: str, text_field: str, rows: int) -> Iterator[str]:
    datasets = _optional("datasets", "Hub datasets")
    identifier, _, config = source.partition(":")
    try:
        stream = datasets.load_dataset(identifier, config or None, streaming=True, split="train")
        # `datasets` and the HTTP clients below it share no base class of errors.
        found = list(stream.take(rows))
    except Exception as error:
        raise DataError(
            f"Cannot read {source!r}: there is no such file or folder, and as a Hub dataset it gave "
            f"{type(error).__name__}: {error}. Check the name, the config (owner/name:config) and the connection."
        ) from error
    for number, row in enumerate(found):
        yield _field(row, text_field, f"Row {number} of the Hub dataset {source}")


def _field(row: Mapping[str, Any], name: str, where: str) -> str:
    if name not in row:
        present = ", ".join(repr(key) for key in row) or "none"
        raise DataError(f"{where} has no field {name!r}. Its fields: {present}. Name one as text_field.")
    text = row[name]
    if not isinstance(text, str):
        raise DataError(f"{where} has {_kind(text)} in the field {name!r}. Expected a string.")
    return checked_text(text, where)


def _optional(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f'{purpose} need a package that is not installed: pip install "slimformer[data]"'
        ) from error


def _choose(available: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(available, generator=generator)[:count].sort().values


def _check(texts: Sequence[str], **sizes: int) -> None:
    # A lone string would be read as a list of characters.
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise DataError(
            "Expected a list of strings as texts. The first of the two results of load_texts is one."
        )
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"{name} must be at least 1, got {size}.")


def _kind(value: object) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"

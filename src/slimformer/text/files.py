"""Lines and paragraphs of text, read no further than asked for; bytes that are no text are named by their line."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from slimformer.errors import DataError

ENCODING: dict[str, Any] = {"encoding": "utf-8-sig", "errors": "surrogateescape"}
# Characters in which a blank line is looked for, to tell paragraphs from lines.
_LOOK_AHEAD = 2**20
_BLANK_LINES = re.compile(r"\n(?:[ \t\r]*\n)+")
_BLANK = re.compile(r"[ \t\r]*\n?")
_MARKS = ("\udcff\udcfe", "\udcfe\udcff", "\0")


def lines_of(path: Path) -> Iterator[str]:
    """The lines of a UTF-8 file, with their ends.

    Raises:
        DataError: If it cannot be read or is no UTF-8, saying in which line.
    """
    try:
        with path.open(**ENCODING) as file:
            yield from checked_lines(file, str(path))
    except FileNotFoundError as error:
        raise DataError(f"The file {path} does not exist. Check its name and folder.") from error
    except OSError as error:
        raise DataError(f"Cannot read {path} as UTF-8 text: {error}.") from error


def typed_lines() -> Iterator[str]:
    """The lines of standard input, as UTF-8 whatever the terminal's encoding is.

    Raises:
        DataError: If they are no UTF-8, saying in which line.
    """
    raw = getattr(sys.stdin, "buffer", None)
    if raw is None:
        yield from sys.stdin or ()
        return
    text = io.TextIOWrapper(raw, **ENCODING)
    try:
        yield from checked_lines(text, "standard input")
    finally:
        # Standard input stays open.
        text.detach()


def checked_lines(lines: Iterable[str], where: str) -> Iterator[str]:
    """The same lines, decoded with `ENCODING`.

    Raises:
        DataError: At the first line that is no UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        if number == 1 and (line.startswith(_MARKS[:2]) or _MARKS[2] in line):
            raise DataError(
                f"Cannot read {where} as UTF-8 text: it begins as UTF-16 or UTF-32 does. Convert it to UTF-8."
            )
        if not line.isascii():
            try:
                line.encode("utf-8")
            except UnicodeEncodeError as error:
                byte = ord(line[error.start]) - 0xDC00
                raise DataError(
                    f"Cannot read {where} as UTF-8 text: line {number} has the byte 0x{byte:02x} behind "
                    f"{error.start} characters. Convert it to UTF-8."
                ) from error
        yield line


def paragraphs(lines: Iterator[str]) -> Iterator[str]:
    """Pieces between blank lines or, without any blank line in the first million characters, the lines."""
    read, size = [], 0
    for line in lines:
        read.append(line)
        size += len(line)
        if size >= _LOOK_AHEAD:
            break
    if not _BLANK_LINES.search("".join(read).strip()):
        yield from (text for line in chain(read, lines) for text in line.splitlines())
        return
    found: list[str] = []
    for line in chain(read, lines):
        if not _BLANK.fullmatch(line):
            found.append(line)
        elif found:
            yield "".join(found).removesuffix("\n")
            found = []
    if found:
        yield "".join(found).rstrip()


def checked_text(text: str, where: str) -> str:
    """The same text.

    Raises:
        DataError: If half of a surrogate pair is in it, which JSON and Python's strings can hold and no text can.
    """
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} holds {text[error.start]!r}, half of a surrogate pair, behind {error.start} characters: "
                "that is no character, and no tokenizer takes it. Write the text anew as UTF-8, or leave it out."
            ) from error
    return text

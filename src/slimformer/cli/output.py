"""What commands print and write: results to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import rich
import typer
from rich.console import Console, RenderableType

from slimformer.errors import PlanError

# The plan's file, as slimformer.plans.plan.FILE: that module imports torch, and this one is read for --help.
_PLAN_FILE = "slimformer.json"
# The exit code of a training that leaves things as they were.
NOTHING_WON = 4


def note(text: str) -> None:
    """One line to standard error."""
    typer.echo(text, err=True)


def begun(what: str) -> None:
    """Says what is begun where standard error is no terminal, and bars show nothing."""
    if not rich.get_console().is_terminal:
        note(f"{what} ...")


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Says what is done while it is done, by a line that moves where standard error is a terminal."""
    begun(what)
    with rich.get_console().status(what):
        yield


def print_json(document: Mapping[str, Any]) -> None:
    """A JSON document to standard output; what is no finite number becomes null, which every parser reads."""
    typer.echo(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False))


def print_tables(*tables: RenderableType) -> None:
    """Tables to standard output."""
    console = Console()
    for table in tables:
        console.print(table)


def leave_where_nothing_was_won(measured: Mapping[str, Any], name: str) -> None:
    """End the command with its own exit code where a training says that it won nothing.

    Args:
        measured: What a plan says was measured.
        name: What it says of that training.
    """
    found = measured.get(name)
    if isinstance(found, Mapping) and found.get("won") is False:
        why = found.get(
            "why", "no step was better than none, at four learning rates each a tenth of the last"
        )
        note(f"Nothing was won: {why}")
        raise typer.Exit(NOTHING_WON)


def check_output(folder: Path, force: bool) -> None:
    """Refuse an output folder before any work is done for it.

    Raises:
        PlanError: If it is a file, holds other files, holds a plan and `force` is not given, or cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise PlanError(f"The output {folder} is a file, and a folder is written. Choose another name.")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / _PLAN_FILE).exists():
            raise PlanError(
                f"The output folder {folder} is not empty and holds no plan. Choose a new or an empty folder."
            )
        if not force:
            raise PlanError(
                f"The output folder {folder} holds a plan. Give --force to replace it, or choose another folder."
            )
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise PlanError(f"The output folder {folder} cannot be written: {existing} does not allow it.")


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it there, so that an older one survives a failure.

    Raises:
        PlanError: If it cannot be written.
    """
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # mkstemp makes files that only their owner reads; a page is made to be shown.
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        raise PlanError(f"Could not write {path}: {error.strerror or error}.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value

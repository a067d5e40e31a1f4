"""Several files that take the place of others together, or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_beside(final: Path, content: bytes, written: list[tuple[str, str]]) -> None:
    """Write a file under another name in the same folder, and add both names to those that `replace_all` takes."""
    handle, temporary = tempfile.mkstemp(dir=final.parent, prefix=".slimformer-")
    written.append((temporary, str(final)))
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    # mkstemp makes files that only their owner reads; a plan is like any other file.
    os.chmod(temporary, 0o644)


def replace_all(written: list[tuple[str, str]]) -> None:
    """Rename all or none: what stood there before is put back if one fails."""
    old: dict[str, bytes | None] = {}
    try:
        for temporary, final in written:
            file = Path(final)
            old[final] = file.read_bytes() if file.exists() else None
            os.replace(temporary, final)
    except OSError:
        for final, content in old.items():
            if content is None:
                Path(final).unlink(missing_ok=True)
            else:
                Path(final).write_bytes(content)
        raise

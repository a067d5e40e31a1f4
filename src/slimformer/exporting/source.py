"""Read a checkpoint tensor by tensor: its weights are never in memory together, and its pickles are never read."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from slimformer.errors import ExportError

CONFIG = "config.json"
MODULES = "modules.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Weights in files that can run code when read.
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    Attributes:
        folder: The whole of it; of a sentence-transformers pipeline the folder with `modules.json`.
        model: Where the model's config and weights are: that folder, or the pipeline's first module.
        config: The content of `config.json`.
        files: Which file holds a tensor, by name.
    """

    folder: Path
    model: Path
    config: dict[str, Any]
    files: Mapping[str, Path]

    @property
    def pipeline(self) -> bool:
        """Whether it is one of sentence-transformers."""
        return (self.folder / MODULES).is_file()

    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own.

        Raises:
            ExportError: If the file is damaged.
        """
        # Closed again, so that pages of the whole file do not stay mapped.
        with _opened(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor.clone()

    def headers(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """How many bytes every tensor takes, and its shape, from the headers of the files.

        Raises:
            ExportError: If a file is damaged, or lacks a tensor that the index says it holds.
        """
        found: dict[str, tuple[int, tuple[int, ...]]] = {}
        for path in dict.fromkeys(self.files.values()):
            with _opened(path) as file:
                there = set(file.keys())
                for name in (name for name, held in self.files.items() if held == path):
                    if name not in there:
                        raise ExportError(
                            f"{path} lacks {name}, which {INDEX} says it holds. Fetch it again."
                        )
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    found[name] = math.prod(shape) * _bytes_of(part.get_dtype()), shape
        return found


def open_source(given: str | Path) -> Source:
    """Find what a checkpoint consists of; reads no weights.

    Args:
        given: A folder, or a Hub id where no such folder exists.

    Raises:
        ExportError: If it is none, its weights are pickles or are not all there.
    """
    folder = Path(given)
    if not folder.exists() and isinstance(given, str) and given.count("/") == 1 and not given.startswith("."):
        folder = _download(given)
    if not folder.is_dir():
        raise ExportError(f"There is no checkpoint at {folder}. Give a folder with {CONFIG}, or a Hub id.")
    model = folder
    if (folder / MODULES).is_file():
        model = _first_module(folder)
    config = read_object(model / CONFIG)
    if "quantization_config" in config:
        raise ExportError(
            f"The checkpoint {folder} is quantised ({config['quantization_config'].get('quant_method', 'unknown')}). "
            "Export the one that is not, and quantise what comes out."
        )
    return Source(folder, model, config, _weight_files(model))


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint.

    Raises:
        ExportError: If there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(
            f"{path} cannot be read ({error}). Give the folder of a transformers checkpoint, with {CONFIG}, weights "
            "and tokenizer."
        ) from error
    if not isinstance(content, dict):
        raise ExportError(f"{path} is damaged: it holds no JSON object.")
    return content


def _download(name: str) -> Path:
    try:
        # Neither pickles nor code, nor what was made of the weights for other engines.
        patterns = [
            "*.safetensors",
            "*.json",
            "*.txt",
            "*.model",
            "*.jinja",
            "LICENSE*",
            "NOTICE*",
            "*/*.json",
        ]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise ExportError(
            f"There is no folder {name}, and the Hub did not give such a checkpoint: {error}"
        ) from error


def _first_module(folder: Path) -> Path:
    path = folder / MODULES
    try:
        place = json.loads(path.read_text(encoding="utf-8"))[0]["path"]
        model = (folder / place).resolve()
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ExportError(
            f"{path} does not say where the model is ({error!r}). Save the pipeline again."
        ) from error
    if not model.is_relative_to(folder.resolve()):
        raise ExportError(f"{path} names {place}, which is outside of the pipeline's folder.")
    return folder / place


def _weight_files(model: Path) -> dict[str, Path]:
    if (model / INDEX).is_file():
        placed = read_object(model / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
            raise ExportError(f"{model / INDEX} is damaged: it has no weight_map. Fetch it again.")
        missing = sorted({file for file in placed.values() if not (model / file).is_file()})
        if missing:
            raise ExportError(
                f"The checkpoint {model} lacks {len(missing)} of its {len(set(placed.values()))} shards: "
                f"{', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''}. Fetch them again."
            )
        return {name: model / file for name, file in placed.items()}
    if (model / SINGLE).is_file():
        with _opened(model / SINGLE) as file:
            return dict.fromkeys(file.keys(), model / SINGLE)
    pickles = sorted(path.name for path in model.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise ExportError(
            f"The weights in {model} are pickles ({', '.join(pickles[:3])}), which can run code when read. Load and "
            "save the model with transformers, which writes safetensors, if you trust where they come from."
        )
    raise ExportError(f"There are no weights in {model}: neither {SINGLE} nor {INDEX}.")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{path} cannot be read: {error}. Fetch it again.") from error


def _bytes_of(dtype: str) -> int:
    # As safetensors writes them: F32, BF16, I64, F8_E4M3, BOOL.
    bits = {"BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8}.get(dtype)
    if bits is None:
        bits = int("".join(c for c in dtype if c.isdigit()) or torch.finfo(torch.float32).bits)
    return max(1, bits // 8)

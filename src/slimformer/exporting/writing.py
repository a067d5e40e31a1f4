"""Write a folder whole or not at all, and weights into it shard by shard."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from slimformer.errors import ExportError
from slimformer.exporting.source import CONFIG, INDEX, MODULES, PICKLES, SINGLE, Source

# A file's tensors are in memory twice while it is written: 70 billion weights become some 140 files in bfloat16.
SHARD_BYTES = 10**9
# A plan that lies with the whole checkpoint is not one for what is left of it; the card speaks of the whole one.
_LEFT_BEHIND = frozenset(
    {"slimformer.json", "slimformer.safetensors", "README.md", CONFIG, INDEX, ".gitattributes"}
)
# Weights, in whatever form, and code.
_NOT_COPIED = PICKLES | {".safetensors", ".h5", ".msgpack", ".onnx", ".gguf", ".py", ".tflite"}


@dataclass(frozen=True)
class Entry:
    """A tensor to write.

    Attributes:
        name: Its name in the new checkpoint.
        size: How many bytes it takes.
        read: Makes it.
        shape: Its shape.
    """

    name: str
    size: int
    read: Callable[[], Tensor]
    shape: tuple[int, ...]


@contextlib.contextmanager
def new_folder(folder: Path, force: bool = False, holds: Sequence[str] = (CONFIG, MODULES)) -> Iterator[Path]:
    """A folder to write in, which takes its name when all is written, and is gone after an exception.

    Args:
        folder: The name.
        force: Whether an earlier export of that name is replaced.
        holds: What a folder must hold one of to be taken for such.

    Raises:
        ExportError: If the name is taken, or the disk is full or does not allow it.
    """
    check_folder(folder, force, holds)
    temporary: Path | None = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}-"))
        # mkdtemp makes folders that only their owner reads.
        temporary.chmod(0o755)
        yield temporary
        _put_in_place(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{folder} could not be written: {error}. Nothing is left of it.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_folder(folder: Path, force: bool, holds: Sequence[str]) -> None:
    """Refuse a name before any work is done for it; arguments and errors are those of `new_folder`."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ExportError(f"{folder} is a file or a link, and a folder is written. Choose another name.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not any((folder / name).exists() for name in holds):
        raise ExportError(f"The folder {folder} holds other files. Choose a new or an empty one.")
    if not force:
        raise ExportError(
            f"The folder {folder} is there already. Replace it with force (--force), or choose another."
        )


def write_weights(folder: Path, entries: Sequence[Entry], shard_bytes: int) -> None:
    """Write tensors in files of some size, with an index where there are several.

    Only the tensors of one file are in memory at a time.
    """
    shards: list[list[Entry]] = []
    filled = 0
    for entry in entries:
        if not shards or filled + entry.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {entry.name: entry.read().contiguous() for entry in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        placed.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        total = sum(entry.size for entry in entries)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object, as transformers writes its own."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_beside(source: Source, folder: Path) -> Path:
    """Copy all that is neither weights nor code: tokenizer, generation config, chat template, licence.

    Of a sentence-transformers pipeline the other modules come whole.

    Args:
        source: The checkpoint.
        folder: Where to.

    Returns:
        The place of the model in the new folder.

    Raises:
        ExportError: If another module of a pipeline holds pickles, or is not there.
    """
    _copy_files(source.model, folder / source.model.relative_to(source.folder))
    if source.pipeline:
        _copy_files(source.folder, folder)
        for module in json.loads((source.folder / MODULES).read_text(encoding="utf-8"))[1:]:
            place = module.get("path", "")
            inside = (source.folder / place).resolve()
            if place and inside != source.model.resolve() and inside.is_relative_to(source.folder.resolve()):
                _copy_module(inside, folder / place)
    return folder / source.model.relative_to(source.folder)


def _copy_files(old: Path, new: Path) -> None:
    new.mkdir(parents=True, exist_ok=True)
    for path in sorted(old.iterdir()):
        if path.is_file() and path.suffix not in _NOT_COPIED and path.name not in _LEFT_BEHIND:
            shutil.copyfile(path, new / path.name)


def _copy_module(old: Path, new: Path) -> None:
    if not old.exists():
        # A normalisation has neither weights nor settings, and some writers leave its folder out.
        return
    pickles = sorted(path.name for path in old.rglob("*") if path.suffix in PICKLES)
    if pickles and not any(old.rglob("*.safetensors")):
        raise ExportError(
            f"The weights in {old} are pickles ({', '.join(pickles)}), which can run code when read. Load and save "
            "the pipeline with sentence-transformers, which writes safetensors, if you trust where they come from."
        )
    shutil.copytree(
        old, new, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*(f"*{end}" for end in PICKLES))
    )


def _put_in_place(temporary: Path, folder: Path) -> None:
    if not folder.exists():
        os.rename(temporary, folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.absolute().parent, prefix=f".{folder.name}-old-"))
    os.rename(folder, aside / "old")
    try:
        os.rename(temporary, folder)
    except OSError:
        os.rename(aside / "old", folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)

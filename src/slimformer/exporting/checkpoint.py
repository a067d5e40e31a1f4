"""An ordinary checkpoint with fewer layers, which everything loads that loads the whole one."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from slimformer.errors import ExportError
from slimformer.exporting.config import part_count, part_within, shortened
from slimformer.exporting.remains import Remains
from slimformer.exporting.skeleton import Skeleton, layers_in, refuse_difference, skeleton
from slimformer.exporting.source import CONFIG, Source
from slimformer.exporting.writing import Entry, copy_beside, write_json, write_weights
from slimformer.model.structures import STRUCTURES

# What layers of some structures do beside attention and MLP; without weights their structure is known by names alone.
_BESIDE = {
    *(row.scalar for row in STRUCTURES if row.scalar),
    *(row.per_layer_input.gate for row in STRUCTURES if row.per_layer_input),
}


def write_checkpoint(
    folder: Path, source: Source, config: Any, dense: Skeleton, remains: Remains, shard_bytes: int
) -> None:
    """Write what is left of a checkpoint, of which every layer that is left is whole.

    Args:
        folder: An empty folder.
        source: The whole checkpoint.
        config: Its config.
        dense: Its model without weights.
        remains: What is left.
        shard_bytes: The most that a file of weights holds, unless one tensor is larger.

    Raises:
        ExportError: If the architecture has no config for it, or a tensor is not where it is expected.
    """
    _refuse_parts_beside(dense, remains)
    raw = shorter_config(source, config, dense, remains.layers)
    model = copy_beside(source, folder)
    write_json(model / CONFIG, raw)
    write_weights(model, remaining_entries(source, dense, remains), shard_bytes)


def shorter_config(source: Source, config: Any, dense: Skeleton, layers: list[int]) -> dict[str, Any]:
    """The content of `config.json` for some of the layers.

    Raises:
        ExportError: If a model of that config is not made of these very layers.
    """
    stack = dense.anatomy.stack.config
    if part_within({}, config, stack) is None:
        # Some models give their stack a copy of its own.
        stack = config.get_text_config()
    raw = shortened(source.config, config, stack, layers)
    if layers != list(range(part_count(stack))):
        shorter = skeleton(_as_read(raw, config), str(source.folder))
        refuse_difference(dense, shorter, layers)
    return raw


def _as_read(raw: dict[str, Any], config: Any) -> Any:
    """The config that a file with this content is read as."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / CONFIG, raw)
        try:
            return type(config).from_pretrained(folder)
        # Such as ModernBERT's in transformers 5.16, which knows no model without sliding windows.
        except Exception as error:
            raise ExportError(
                f"{type(config).__name__} of this version of transformers cannot describe what is left: {error}. "
                "Keep a layer of every type, or upgrade transformers."
            ) from error


def remaining_entries(
    source: Source, dense: Skeleton, remains: Remains, unused: Mapping[int, frozenset[str]] | None = None
) -> list[Entry]:
    """The tensors that are left, under their new names, with what repair changed merged.

    Args:
        source: The whole checkpoint.
        dense: Its model without weights.
        remains: What is left.
        unused: Children that are not needed of a layer that is left.

    Raises:
        ExportError: If repair changed a tensor that the checkpoint does not hold under that name, or it keeps tensors
            of single layers in another place.
    """
    lead = layers_in(source, dense)
    _refuse_elsewhere(source, dense, lead)
    place = re.compile(rf"{re.escape(lead)}(\d+)\.(.+)")
    numbers = {old: new for new, old in enumerate(remains.layers)}
    changes = dict(remains.changes)
    entries = []
    for name, (size, shape) in source.headers().items():
        matched = place.fullmatch(name)
        if matched is None:
            entries.append(Entry(name, size, partial(source.read, name), shape))
            continue
        old, inside = int(matched[1]), matched[2]
        changed = changes.pop((old, inside), ())
        if old not in numbers or inside.partition(".")[0] in (unused or {}).get(old, ()):
            continue
        entries.append(
            Entry(
                f"{lead}{numbers[old]}.{inside}", size, partial(_merged, source, name, tuple(changed)), shape
            )
        )
    for old, inside in changes:
        if old in numbers and inside.partition(".")[0] not in (unused or {}).get(old, ()):
            raise ExportError(
                f"Repair changed {inside} of layer {old}, and the checkpoint {source.model} has no such tensor: "
                f"{lead}{old}.{inside}. Load and save it with transformers, which writes today's names."
            )
    return entries


def _refuse_parts_beside(dense: Skeleton, remains: Remains) -> None:
    """Raise where a layer without attention and MLP still does something, or others read its weights."""
    layers = dense.anatomy.layers
    gone = [i for i in range(remains.count) if i not in remains.layers]
    for index in gone:
        own = sorted(name for name in _BESIDE if hasattr(layers[index], name))
        if own:
            raise ExportError(
                f"Layer {index} has {own[0]} beside attention and MLP, which is computed without them too, so that it "
                "cannot be left out of a checkpoint. Apply the plan with slimformer.patch."
            )
    read = {id(parameter): i for i in remains.layers for parameter in layers[i].parameters()}
    for index in gone:
        for name, parameter in layers[index].named_parameters():
            if id(parameter) in read:
                raise ExportError(
                    f"Layers {index} and {read[id(parameter)]} share {name}, and the checkpoint holds it once. Drop "
                    "none of them, or apply the plan with slimformer.patch."
                )


def _refuse_elsewhere(source: Source, dense: Skeleton, lead: str) -> None:
    """Raise where numbered tensors are none of the model's own outside of its layers: they may be of single layers."""
    inside = f"{dense.layers}."
    outside = {name for name in dense.model.state_dict() if not name.startswith(inside)}
    for name in source.files:
        numbered = any(part.isdigit() for part in name.split("."))
        # Names differ in front, by the name of the model inside.
        if numbered and not name.startswith(lead) and not any(_ends(name, own) for own in outside):
            raise ExportError(
                f"The checkpoint {source.model} holds {name}, which may belong to a single layer and is not among its "
                f"tensors ({lead}0 and so on). Apply the plan with slimformer.patch."
            )


def _ends(name: str, other: str) -> bool:
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def _merged(source: Source, name: str, changes: tuple[Any, ...]) -> Tensor:
    tensor = source.read(name)
    for change in changes:
        tensor = change(tensor)
    return tensor

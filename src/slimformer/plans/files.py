"""Read the two files of a plan, which may come from anyone: sizes, depth and types are checked as they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from slimformer.errors import PlanError

# A hundred times what calibration writes of a model with a hundred layers.
_LARGEST_JSON = 2**24
# All 32 attentions of a Llama-3.1-8B as filters of eight taps in float32, as much as the model itself in bfloat16.
_LARGEST_WEIGHTS = 2**34
# Calibration writes five levels.
_DEEPEST = 32


def read_json(file: Path) -> Any:
    """The content of a plan's JSON file.

    Raises:
        PlanError: If there is no such file, it is larger or nests deeper than any plan, or is no JSON.
    """
    try:
        text = _bytes_of(file, _LARGEST_JSON).decode("utf-8")
        content = json.loads(text)
        _check_depth(content)
    except OSError as error:
        raise PlanError(
            f"No plan at {file}: {error.strerror or error}. Expected a folder that holds slimformer.json."
        ) from error
    except RecursionError as error:
        raise PlanError(f"{file} is damaged: it nests deeper than any plan. Save the plan again.") from error
    except ValueError as error:
        raise PlanError(f"{file} is damaged: {error}. Save the plan again.") from error
    return content


def read_weights(file: Path, digest: Any) -> dict[str, Tensor]:
    """The tensors of a plan's safetensors file; none where the JSON gives no checksum of it.

    safetensors itself checks that the header is no longer than 100 MB, and that tensors lie behind each other without
    gaps and are as long as their shapes and types say.

    Raises:
        PlanError: If the file is absent, too large, damaged or another plan's.
    """
    if digest is None:
        return {}
    try:
        content = _bytes_of(file, _LARGEST_WEIGHTS)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"The plan's weights in {file} cannot be read: {error}. Save the plan again."
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise PlanError(
            f"{file} is damaged, or belongs to another plan: its checksum differs. Save it again."
        )
    try:
        return safetensors.torch.load(content)
    # Types that torch does not have and shapes that it cannot index are errors of many classes there.
    except (
        SafetensorError,
        ArithmeticError,
        AssertionError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise PlanError(
            f"The plan's weights in {file} cannot be read: {error!r}. Save the plan again."
        ) from error


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """What a plan's JSON says of its weights: the type and the sizes of each.

    Example:
        >>> shapes_of({"0.head.bias": torch.zeros(4)})
        {'0.head.bias': ['float32', 4]}
    """
    return {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()}


def stand_ins(shapes: Any) -> dict[str, Tensor] | None:
    """Tensors without values for what `shapes_of` says; None where it says nothing of that kind.

    Example:
        >>> stand_ins({"0.head.bias": ["float32", 4]})["0.head.bias"].is_meta
        True
    """
    if not isinstance(shapes, dict):
        return None
    found = {}
    for name, entry in shapes.items():
        if not isinstance(entry, list) or not entry:
            return None
        dtype = getattr(torch, str(entry[0]), None)
        if not isinstance(dtype, torch.dtype) or not all(type(n) is int and n >= 0 for n in entry[1:]):
            return None
        try:
            found[name] = torch.empty(entry[1:], dtype=dtype, device="meta")
        except (RuntimeError, OverflowError, TypeError):
            return None
    return found


def mapping(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One of the JSON's objects; empty where it is left out.

    Raises:
        TypeError: If it is something else.
    """
    found = content.get(name, {})
    if not isinstance(found, dict):
        raise TypeError(f"{name} is {type(found).__name__} and no object")
    return found


def _bytes_of(file: Path, largest: int) -> bytes:
    if file.exists() and not file.is_file():
        # A pipe would be waited for without end.
        raise OSError(None, "it is no file")
    size = file.stat().st_size
    if size > largest:
        raise ValueError(f"it has {size:,} bytes, and a plan's has at most {largest:,}")
    with file.open("rb") as opened:
        # It may have grown meanwhile.
        content = opened.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it has more than {largest:,} bytes")
    return content


def _check_depth(content: Any) -> None:
    level: list[Any] = [[content]]
    for _ in range(_DEEPEST):
        inside: list[Any] = []
        for value in level:
            inside.extend(value.values() if isinstance(value, dict) else value)
        level = [value for value in inside if isinstance(value, (dict, list))]
        if not level:
            return
    raise ValueError(f"it nests deeper than {_DEEPEST} levels, as no plan does")

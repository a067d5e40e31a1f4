"""A model without weights, made from a config: where its layers are, and whether a shorter one is made of the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from slimformer.errors import ExportError, UnsupportedModelError
from slimformer.exporting.source import Source
from slimformer.model.anatomy import Anatomy, find_anatomy

# What a module knows of its own place, another one in a shorter model, and what no result depends on.
_PLACES = frozenset(
    {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "training", "name_or_path"}
)
_SIMPLE = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device.

    Attributes:
        model: The model.
        anatomy: Where its layers are.
        layers: The name of their list in the model.
    """

    model: PreTrainedModel
    anatomy: Anatomy
    layers: str


def skeleton(config: Any, name: str) -> Skeleton:
    """The model that a config describes, without weights.

    Args:
        config: Of a transformers model.
        name: What it is of, for messages.

    Raises:
        ExportError: If it cannot be built, or its layers are called several times.
        UnsupportedModelError: If it has no list of layers.
    """
    wanted = next(iter(getattr(config, "architectures", None) or []), "")
    factory = getattr(transformers, wanted, None)
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(config) if factory is None else factory._from_config(config)
    # Whatever a config that does not fit its own architecture raises.
    except Exception as error:
        raise ExportError(
            f"The architecture of {name} ({wanted or type(config).__name__}) cannot be built from its config: {error}."
        ) from error
    anatomy = find_anatomy(model.eval())
    path = next((path for path, module in model.named_modules() if module is anatomy.layers), None)
    if path is None or anatomy.repeats:
        raise UnsupportedModelError(
            f"{type(anatomy.stack).__name__} calls its layers several times or in groups, so that none can be taken "
            "out of a checkpoint. Apply the plan with slimformer.patch."
        )
    return Skeleton(model, anatomy, path)


def read_config(source: Source) -> Any:
    """The config of a checkpoint.

    Raises:
        ExportError: If transformers does not know its architecture; code that comes with a checkpoint is not run.
    """
    try:
        return AutoConfig.from_pretrained(source.model)
    except (ValueError, KeyError, OSError, TypeError) as error:
        raise ExportError(
            f"transformers knows no architecture for the checkpoint {source.model}: {error}"
        ) from error


def layers_in(source: Source, found: Skeleton) -> str:
    """The name in front of every layer's number in a checkpoint, with its dot, such as `"model.layers."`.

    It can differ from the model's own by the name of the model inside.

    Raises:
        ExportError: If the checkpoint has no such tensors for every layer.
    """
    count = len(found.anatomy.layers)
    stack = next(name for name, module in found.model.named_modules() if module is found.anatomy.stack)
    inner = found.layers[len(stack) + 1 :] if stack else found.layers
    inside = {name for name, _ in found.anatomy.layers[0].named_parameters()}
    place = re.compile(rf"((?:.*\.)?{re.escape(inner)}\.)(\d+)\.(.+)")
    seen: dict[str, tuple[set[int], int]] = {}
    for name in source.files:
        matched = place.fullmatch(name)
        if matched is not None:
            numbers, known = seen.setdefault(matched[1], (set(), 0))
            numbers.add(int(matched[2]))
            seen[matched[1]] = numbers, known + (matched[3] in inside)
    fitting = {lead: known for lead, (numbers, known) in seen.items() if numbers >= set(range(count))}
    best = max(fitting.values(), default=0)
    leads = [lead for lead, known in fitting.items() if known == best]
    own = [lead for lead in leads if f"{found.layers}.".endswith(lead) or lead.endswith(f".{found.layers}.")]
    leads = own if len(own) == 1 else leads
    if len(leads) != 1:
        absent = [i for i in range(count) if not any(i in numbers for numbers, _ in seen.values())]
        what = f"none of layer {absent[0]}" if absent and seen else "no layers of that name"
        raise ExportError(
            f"The checkpoint {source.model} holds {what} ({inner}.0 to {inner}.{count - 1} are expected, once). "
            "Load and save it with transformers, which writes today's names."
        )
    return leads[0]


def refuse_difference(dense: Skeleton, shorter: Skeleton, layers: Sequence[int]) -> None:
    """Raise unless a shorter model is made of parts of the dense one.

    Args:
        dense: The whole model.
        shorter: The model of which the exported config speaks.
        layers: Which layers of the whole model its layers are.

    Raises:
        ExportError: If a part computes otherwise at its new place, such as one that depends on its depth.
    """
    name = type(dense.anatomy.stack).__name__
    if len(shorter.anatomy.layers) != len(layers):
        raise ExportError(
            f"A config of {name} cannot say that {len(layers)} layers are left: it gives "
            f"{len(shorter.anatomy.layers)}. Apply the plan with slimformer.patch."
        )
    if getattr(dense.anatomy.stack.config, "scale_attn_by_inverse_layer_idx", False):
        raise _depends(name, "every attention", "divides its scores by its depth")
    outside = (_outside(dense), _outside(shorter))
    if outside[0].keys() != outside[1].keys():
        odd = min(outside[0].keys() ^ outside[1].keys())
        raise _depends(name, odd, "is not in both the whole and the shorter model")
    counts = (len(dense.anatomy.layers), len(layers))
    for path, module in outside[0].items():
        _compare(name, path, module, outside[1][path], counts, layers)
    for new, old in enumerate(layers):
        pair = (dense.anatomy.layers[old], shorter.anatomy.layers[new])
        before, after = (dict(layer.named_modules()) for layer in pair)
        if before.keys() != after.keys():
            odd = min(before.keys() ^ after.keys())
            raise _depends(name, f"{odd} of layer {old}", "is built otherwise at another depth")
        for path, module in before.items():
            _compare(name, f"{path or 'the whole'} of layer {old}", module, after[path], (old, new), layers)


def _outside(found: Skeleton) -> dict[str, nn.Module]:
    lead = found.layers + "."
    return {name: module for name, module in found.model.named_modules() if not name.startswith(lead)}


def _compare(
    name: str, path: str, old: nn.Module, new: nn.Module, places: tuple[int, int], layers: Sequence[int]
) -> None:
    if type(old) is not type(new):
        raise _depends(
            name, path, f"is {type(old).__name__} there and {type(new).__name__} in a shorter model"
        )
    shapes = (_shapes(old), _shapes(new))
    if shapes[0] != shapes[1]:
        raise _depends(name, path, f"has parameters {shapes[0]} there and {shapes[1]} in a shorter model")
    # A rotation holds angles for every type of layers that is left.
    rotates = bool(old._non_persistent_buffers_set)
    before, after = _simple(vars(old)), _simple(vars(new))
    for key in before.keys() | after.keys():
        was, now = before.get(key), after.get(key)
        listed = was if isinstance(was, (list, tuple)) and len(was) > max(layers) else ()
        follows = bool(listed) and [listed[i] for i in layers] == list(now or ())
        fewer = rotates and (key not in after or (_entries(now) <= _entries(was) != set()))
        if not (was == now or (was, now) == places or follows or fewer):
            raise _depends(name, path, f"has {key}={was!r} there and {now!r} in a shorter model")


def _entries(value: Any) -> set[Any]:
    return set(value) if isinstance(value, (list, tuple)) else set()


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    saved = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
    return {k: tuple(v.shape) for k, v in (*module._parameters.items(), *saved.items()) if v is not None}


def _simple(attributes: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> bool:
        return isinstance(value, _SIMPLE) or (isinstance(value, (list, tuple)) and _all_simple(value))

    return {k: v for k, v in attributes.items() if not k.startswith("_") and k not in _PLACES and plain(v)}


def _all_simple(values: Iterable[Any]) -> bool:
    return all(isinstance(value, _SIMPLE) for value in values)


def _depends(name: str, path: str, what: str) -> ExportError:
    return ExportError(
        f"{name} cannot be written as a checkpoint with fewer layers, since {path} {what}. Apply the plan with "
        "slimformer.patch."
    )

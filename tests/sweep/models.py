"""Tiny random models of every text class, with weights under which every part counts."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sweep.classes import Family
from sweep.sizes import COUNTS, OWN, SIZES


def tiny_config(family: Family) -> PretrainedConfig:
    """A config of the family's class: common attributes small, one layer of every type."""
    own = {**OWN.get(family.config.model_type, {}), **OWN.get(family.name, {}), **family.settings}
    if family.use == "decoder" and family.name.endswith(":decoder"):
        own["is_decoder"] = True
    cls = family.config
    try:
        default: Any = cls()
    except Exception:
        default = cls(**own)
    aliases = getattr(cls, "attribute_map", {})
    values: dict[str, Any] = {}
    known = set(vars(default)) | set(inspect.signature(cls.__init__).parameters)
    for name, value in SIZES.items():
        name = aliases.get(name, name)
        given = vars(default).get(name, getattr(cls, name, None))
        if name in known and given is not None and not isinstance(given, (list, tuple, dict)):
            values.setdefault(name, value)
    if vars(default).get("kv_lora_rank") and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    values.update(_per_layer(default, own))
    if getattr(default, "rope_parameters", None):
        values["rope_parameters"] = _rope(default.rope_parameters)
    return cls(**{**values, **own})


def _per_layer(default: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Lists of one entry a layer, with every entry that the default list has."""
    number = next((name for name in COUNTS if isinstance(vars(default).get(name), int)), None)
    if number is None:
        return {}
    lists = {
        name: value
        for name, value in vars(default).items()
        if isinstance(value, (list, tuple))
        and len(value) == vars(default)[number]
        and not name.startswith("_")
    }
    kinds = {name: list(dict.fromkeys(map(_hashable, value))) for name, value in lists.items()}
    layers = own.get(number, max([4, *(2 * len(k) for k in kinds.values() if 1 < len(k) < 5)]))
    made: dict[str, Any] = {number: layers}
    for name, value in lists.items():
        found = kinds[name] if len(kinds[name]) < 5 else [value[0], value[-1]]
        if name == "layer_types" or "mlp" not in name:
            made[name] = [found[i % len(found)] for i in range(layers)]
        else:
            made[name] = [found[min(i, len(found) - 1)] for i in range(layers)]
    return made


def _hashable(value: Any) -> Any:
    return value if not isinstance(value, (list, dict)) else str(value)


def _rope(given: dict[str, Any]) -> dict[str, Any]:
    """The family's own rotation, with an original length that texts go beyond."""
    made: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            made[name] = _rope(value)
        elif name == "original_max_position_embeddings":
            made[name] = 8
        elif name == "mrope_section":
            made[name] = [2, 1, 1]
        else:
            made[name] = copy.deepcopy(value)
    return made


def build(family: Family) -> PreTrainedModel:
    """A float32 model in eval mode whose weights are exact in bfloat16 too."""
    config = tiny_config(family)
    torch.manual_seed(0)
    model = (
        family.model._from_config(config) if hasattr(family.model, "_from_config") else family.model(config)
    )
    model = model.float().eval()
    if family.part == "encoder":
        model = model.get_encoder()
    spread(model)
    return model


# Queries and keys large enough that scores are not flat.
_SHARP = ("q_proj", "k_proj", "query", "key", "q_lin", "k_lin", "qkv", "q_a_proj", "q_b_proj")


def spread(model: nn.Module) -> None:
    """Weights of a size under which every sublayer, bias, norm, sink and scalar changes the output."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        tensors = dict(model.named_parameters())
        persistent = set(model.state_dict())
        buffers = {n: b for n, b in model.named_buffers() if n in persistent and b.is_floating_point()}
        for name, weight in (*tensors.items(), *buffers.items()):
            noise = torch.randn(weight.shape, generator=generator)
            constant = weight.numel() > 0 and bool((weight == weight.flatten()[0]).all())
            finite = (
                bool(weight.isfinite().all()) and float(weight.abs().max() if weight.numel() else 0) < 1e3
            )
            if weight.dim() < 2 or (constant and finite and bool(weight.flatten()[:1].any())):
                weight.copy_((weight if finite else 0) + noise * 0.2)
            elif name in tensors:
                size = 0.5 if _is_table(model, name) else weight.shape[-1] ** -0.5
                sharp = any(part in name.rpartition(".")[0].rpartition(".")[2] for part in _SHARP)
                weight.copy_(noise * size * (2 if sharp else 1))
            elif constant:
                weight.add_(noise * 0.2)
            weight.copy_(weight.to(torch.bfloat16))


def _is_table(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)

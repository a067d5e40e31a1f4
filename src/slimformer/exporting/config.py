"""The config of a model with fewer layers: what it says of each layer follows the layers that are left."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from slimformer.errors import ExportError

# Lists of layer numbers.
_NUMBERS = frozenset(
    {
        "mlp_only_layers",
        "attn_layer_indices",
        "full_attn_idxs",
        "moe_layers",
        "cross_attention_layers",
        "global_attn_layers",
        "kv_shared_layers",
    }
)
# How many of the first layers are of another kind than the rest.
_FIRST = frozenset({"first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"})
# Layers behind the last that only guess further tokens.
_BEHIND = ("num_nextn_predict_layers",)
# Lists that may have as many entries as there are layers and say nothing of them.
_OTHER_LISTS = ("token_id", "token_ids", "architectures", "keys_to_ignore_at_inference", "suppress_tokens")


def shortened(raw: dict[str, Any], config: Any, stack: Any, layers: Sequence[int]) -> dict[str, Any]:
    """The content of `config.json` for a model of which only some layers are left.

    Args:
        raw: The content of the whole model's.
        config: The config that it was read as.
        stack: The config of the layers' stack: the same, or one within.
        layers: The layers that are left, in order.

    Raises:
        ExportError: If the stack's config is not found in the whole.
    """
    new = copy.deepcopy(raw)
    # Code that comes with a checkpoint is not taken along.
    new.pop("auto_map", None)
    part = _part_of(new, config, stack)
    count = part_count(stack)
    for name, value in stack.to_dict().items():
        if name in _NUMBERS and isinstance(value, list):
            part[name] = [layers.index(i) for i in value if i in layers]
        elif name in _FIRST and isinstance(value, int):
            part[name] = sum(i < value for i in layers)
        elif name == "attention_types" and hasattr(stack, "attention_layers"):
            # GPT-Neo's: kinds of attention, and how often they come round.
            part[name] = [[[stack.attention_layers[i] for i in layers], 1]]
        elif isinstance(value, list) and _of_layers(name, len(value), count):
            part[name] = [value[i] for i in layers]
    if isinstance(part.get("per_layer_config"), dict):
        own = {int(i): value for i, value in part["per_layer_config"].items()}
        part["per_layer_config"] = {str(new): own[old] for new, old in enumerate(layers) if old in own}
    for name in _BEHIND:
        if name in part:
            part[name] = 0
    written = next((name for name in count_names(stack) if name in part), count_names(stack)[0])
    for name in count_names(stack):
        part.pop(name, None)
    part[written] = len(layers)
    return new


def _of_layers(name: str, length: int, count: int) -> bool:
    """Whether a list of a config has an entry for every layer; types may be given for more than there are."""
    if name == "layer_types":
        return length >= count
    return length == count and not name.endswith(_OTHER_LISTS)


def part_count(stack: Any) -> int:
    """How many layers a config says its stack has."""
    return int(
        next(getattr(stack, name) for name in ("num_hidden_layers", "num_layers") if hasattr(stack, name))
    )


def count_names(stack: Any) -> list[str]:
    """The names by which configs of this type give the number of layers, the type's own first."""
    aliases: dict[str, str] = getattr(stack, "attribute_map", {})
    known = "num_hidden_layers" if hasattr(stack, "num_hidden_layers") else "num_layers"
    return list(dict.fromkeys((aliases.get(known, known), known)))


def part_within(raw: dict[str, Any], config: Any, stack: Any) -> dict[str, Any] | None:
    """Where `raw` speaks of the stack, if `config`, as which it was read, has it somewhere."""
    if config is stack:
        return raw
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            found = part_within(raw.setdefault(name, {}), inner, stack)
            if found is not None:
                return found
            if not raw[name]:
                del raw[name]
    return None


def _part_of(raw: dict[str, Any], config: Any, stack: Any) -> dict[str, Any]:
    found = part_within(raw, config, stack)
    if found is None:
        raise ExportError(
            f"The config {type(config).__name__} does not hold that of its layers ({type(stack).__name__}), so that "
            "it cannot say how many are left. Apply the plan with slimformer.patch."
        )
    return found

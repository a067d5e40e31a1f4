"""Formats for layers of which only the attention or only the MLP is left, or something small in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slimformer.errors import ExportError
from slimformer.exporting.checkpoint import remaining_entries, shorter_config
from slimformer.exporting.configs import DROPPED, FILTER, KEPT, MEAN, SLIM
from slimformer.exporting.remains import Remains
from slimformer.exporting.skeleton import Skeleton, layers_in
from slimformer.exporting.source import CONFIG, Source
from slimformer.exporting.writing import Entry, copy_beside, write_json, write_weights
from slimformer.model.layer_parts import KINDS, Kind

# Fields of Llama's config, which those of the others have too.
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "rope_parameters",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Widths are rounded up to a multiple of this where they are read.
_ROUNDED = 256


def why_not_nemotron(config: Any, remains: Remains) -> str:
    """What keeps a model from being written as `nemotron-nas`, in words; empty if nothing does."""
    kind = config.model_type
    if kind not in ("llama", "mistral", "qwen2"):
        return f"nemotron-nas has Llama's layers, and {kind} has others"
    if remains.added:
        return "nemotron-nas has neither means nor filters with a bias"
    if (remains.layers[0], "attention") in remains.dropped:
        return f"nemotron-nas needs the attention of its first layer, and that of layer {remains.layers[0]} is dropped"
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if types != {"full_attention"} or (kind == "mistral" and config.sliding_window is not None):
        return "nemotron-nas has no sliding windows"
    if config.hidden_act != "silu" or config.intermediate_size % _ROUNDED:
        return (
            f"nemotron-nas has MLPs with silu of a width that is a multiple of {_ROUNDED}, and these are "
            f"{config.intermediate_size} wide with {config.hidden_act}"
        )
    return ""


def why_not_slim(config: Any, remains: Remains) -> str:
    """What keeps a model from being written for slimformer's plugin in vLLM, in words; empty if nothing does."""
    if config.model_type not in SLIM:
        return f"the plugin knows {', '.join(SLIM)}, and not {config.model_type}"
    if not any((index, "attention") not in remains.dropped for index in remains.layers):
        return "vLLM needs at least one attention, and all are dropped"
    return ""


def write_nemotron(
    folder: Path, source: Source, config: Any, dense: Skeleton, remains: Remains, shard_bytes: int
) -> None:
    """Write a `nemotron-nas` checkpoint (`DeciLMForCausalLM`); arguments are those of `write_checkpoint`.

    Raises:
        ExportError: If a tensor is not where it is expected.
    """
    raw = {name: getattr(config, name) for name in _FIELDS if hasattr(config, name)}
    rope = raw.get("rope_parameters") or {}
    raw["rope_theta"] = rope.get("rope_theta", 10000.0)
    if rope.get("rope_type", "default") != "default":
        # By the name that readers of this format know.
        raw["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    # The biases of Qwen2's queries, keys and values, which its config does not mention.
    bias = config.model_type == "qwen2" or getattr(config, "attention_bias", False)
    own = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "attention_bias": bool(getattr(config, "attention_bias", False)),
        "qkv_bias": bool(bias),
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "num_hidden_layers": len(remains.layers),
        "block_configs": [_block(config, remains, index) for index in remains.layers],
        "per_layer_config": _skips(remains),
        "dtype": source.config.get("dtype", source.config.get("torch_dtype", "float32")),
    }
    _write(folder, source, dense, remains, {**raw, **own}, shard_bytes)


def write_slim(
    folder: Path, source: Source, config: Any, dense: Skeleton, remains: Remains, shard_bytes: int
) -> None:
    """Write a checkpoint for slimformer's plugin in vLLM; arguments are those of `write_checkpoint`.

    Raises:
        ExportError: If a tensor is not where it is expected.
    """
    own, architecture = SLIM[config.model_type]
    raw = shorter_config(source, config, dense, remains.layers)
    raw.update(
        architectures=[architecture],
        model_type=own.model_type,
        slimformer_layers=[{kind: _left(remains, index, kind) for kind in KINDS} for index in remains.layers],
        per_layer_config=_skips(remains),
    )
    _write(folder, source, dense, remains, raw, shard_bytes)


def _write(
    folder: Path, source: Source, dense: Skeleton, remains: Remains, raw: dict[str, Any], shard_bytes: int
) -> None:
    if source.pipeline:
        raise ExportError("A sentence-transformers pipeline stays one only where whole blocks are dropped.")
    entries = remaining_entries(source, dense, remains, unused_children(dense, remains))
    lead = layers_in(source, dense)
    for new, old in enumerate(remains.layers):
        for kind in KINDS:
            parts = remains.added.get((old, kind), (None, None))
            for name, tensor in zip(("bias", "weight"), parts, strict=True):
                if tensor is not None:
                    # As exact as the plan has it: engines cast it to what they compute in.
                    size = tensor.numel() * tensor.element_size()
                    name = f"{lead}{new}.slimformer_{kind}.{name}"
                    entries.append(Entry(name, size, tensor.detach().cpu().clone, tuple(tensor.shape)))
    model = copy_beside(source, folder)
    write_json(model / CONFIG, raw)
    write_weights(model, entries, shard_bytes)


def unused_children(dense: Skeleton, remains: Remains) -> dict[int, frozenset[str]]:
    """The children of every layer that nothing reads; a filter reads what the norm in front makes of the residual."""
    unused: dict[int, set[str]] = {}
    for index, kind in remains.dropped:
        parts = dense.anatomy.structure.parts(kind)
        names = set(parts.children())
        matrix = remains.added.get((index, kind), (None, None))[1]
        if matrix is not None and parts.norm_before is not None:
            names.discard(parts.norm_before)
        unused.setdefault(index, set()).update(names)
    return {index: frozenset(names) for index, names in unused.items()}


def _left(remains: Remains, index: int, kind: Kind) -> str:
    if (index, kind) not in remains.dropped:
        return KEPT
    if (index, kind) not in remains.added:
        return DROPPED
    return MEAN if remains.added[index, kind][1] is None else FILTER


def _skips(remains: Remains) -> dict[str, dict[str, list[str]]]:
    """In the vocabulary of transformers, whose models do not read it yet."""
    gone = {
        str(new): [kind for kind in KINDS if remains.gone(old, kind)]
        for new, old in enumerate(remains.layers)
    }
    return {index: {"skip": list(kinds)} for index, kinds in gone.items() if kinds}


def _block(config: Any, remains: Remains, index: int) -> dict[str, dict[str, Any]]:
    attention, mlp = ((index, kind) in remains.dropped for kind in KINDS)
    group = config.num_attention_heads // config.num_key_value_heads
    # The width comes back of it as 2/3 * ffn_mult * hidden.
    wide = 3 * config.intermediate_size / (2 * config.hidden_size)
    return {
        "attention": {
            "no_op": attention,
            "replace_with_linear": False,
            "n_heads_in_group": None if attention else group,
        },
        "ffn": {"no_op": mlp, "replace_with_linear": False, "ffn_mult": None if mlp else wide},
    }

"""Which models llama.cpp computes as transformers does, and the hyperparameters that it reads of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slimformer.exporting.remains import Remains

_GELU = "gelu_pytorch_tanh"


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes a family of models.

    Attributes:
        name: Its name there.
        activation: Of the MLP, the only one that it has.
        interleaved: Whether it rotates neighbouring channels of queries and keys, so that their rows change places.
        offset: What is added to the weights of norms, for families whose norms multiply with one more.
        scaled: Whether it knows the scaling of positions of Llama 3.
        windows: Whether all layers but one in `every` have a sliding window.
        unrotated: Whether one layer in `every` is not rotated.
        every: In how many layers one is of the other kind.
        other_scores: A number of layers from which it concludes that scores are divided by something else.
    """

    name: str
    activation: str = "silu"
    interleaved: bool = False
    offset: float = 0.0
    scaled: bool = False
    windows: bool = False
    unrotated: bool = False
    every: int = 0
    other_scores: int = 0


# By the model type in transformers.
ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, scaled=True),
    "mistral": Architecture("llama", interleaved=True, scaled=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "olmo2": Architecture("olmo2"),
    "smollm3": Architecture("smollm3", interleaved=True, unrotated=True, every=4),
    "gemma2": Architecture("gemma2", _GELU, offset=1.0, windows=True, every=2, other_scores=46),
    "gemma3_text": Architecture("gemma3", _GELU, offset=1.0, windows=True, every=6, other_scores=62),
}
# Layers that may lack their attention, or have a linear layer in its place.
DECI = Architecture("deci", interleaved=True, scaled=True)
_AS_DECI = ("llama", "mistral", "qwen2")


def architecture_of(config: Any, remains: Remains) -> Architecture:
    """The architecture as which a model is written."""
    return ARCHITECTURES[config.model_type] if remains.whole else DECI


def why_not_gguf(config: Any, remains: Remains) -> str:
    """What keeps a model from being written for llama.cpp, in words; empty if nothing does."""
    kind = config.model_type
    if kind not in ARCHITECTURES:
        return f"GGUF is written for {', '.join(ARCHITECTURES)}, and this is {kind}"
    if not next(iter(config.architectures or [""])).endswith("ForCausalLM"):
        return "GGUF is written for language models, with their output layer"
    architecture = architecture_of(config, remains)
    if architecture is DECI and kind not in _AS_DECI:
        return (
            f"llama.cpp's architecture for layers of which only a part is left, deci, has the layers of "
            f"{', '.join(_AS_DECI)}, and {kind} has others"
        )
    if not any((index, "attention") not in remains.dropped for index in remains.layers):
        return "llama.cpp needs at least one attention, and all are dropped"
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        return f"llama.cpp computes {kind} with {architecture.activation}, and this model has {activation}"
    return (
        _why_not_rotation(config, architecture)
        or _why_not_layers(config, architecture, remains)
        or _why_not_scores(config, architecture, remains)
    )


def _why_not_rotation(config: Any, architecture: Architecture) -> str:
    for place, rope in enumerate(_ropes(config)):
        kind = rope.get("rope_type", "default")
        # Other layers than the first kind's are turned by their own base, and not scaled.
        scaled = () if place else ("linear", "llama3") if architecture.scaled else ("linear",)
        if kind not in ("default", *scaled):
            return f"positions are scaled by {kind}, which llama.cpp was not seen to do alike in {architecture.name}"
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            return "only a part of every head is rotated"
    return ""


def _why_not_layers(config: Any, architecture: Architecture, remains: Remains) -> str:
    types: list[str] = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    slides = [bool(types) and types[i] != "full_attention" for i in remains.layers]
    everywhere = not types and window is not None and window < config.max_position_embeddings
    if not architecture.windows and (everywhere or any(slides)):
        return f"llama.cpp's {architecture.name} has no sliding windows, and this model has one of {window}"
    if not architecture.every:
        return ""
    turned = [bool(config.no_rope_layers[i]) for i in remains.layers] if architecture.unrotated else slides
    if turned != [(i + 1) % architecture.every != 0 for i in range(len(turned))]:
        what = "is not rotated" if architecture.unrotated else "has full attention"
        return (
            f"in llama.cpp's {architecture.name} one layer of {architecture.every} {what}, and of those that are left "
            f"others do: drop layers {architecture.every} at a time, or from the end"
        )
    return ""


def _why_not_scores(config: Any, architecture: Architecture, remains: Remains) -> str:
    heads, width = config.num_attention_heads, head_width(config)
    scale = getattr(config, "query_pre_attn_scalar", width)
    read = config.hidden_size / heads if len(remains.layers) == architecture.other_scores else width
    if scale != read:
        return (
            f"this model divides its scores by the root of {scale:g}, and llama.cpp by that of {read:g} in a "
            f"{architecture.name} of {len(remains.layers)} layers"
        )
    if getattr(config, "use_bidirectional_attention", False):
        return "tokens see those behind them"
    if architecture.name == "qwen3" and config.attention_bias:
        return "llama.cpp's qwen3 has no biases in attentions"
    return ""


def head_width(config: Any) -> int:
    """How many channels a head has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _ropes(config: Any) -> list[dict[str, Any]]:
    """How positions are turned, of layers with full attention first."""
    rope = getattr(config, "rope_parameters", None) or {}
    if "full_attention" not in rope:
        return [rope]
    return [rope["full_attention"], *(value for name, value in rope.items() if name != "full_attention")]


def add_hyperparameters(
    writer: Any, config: Any, heads: Sequence[int], key_heads: Sequence[int], widths: Sequence[int]
) -> None:
    """Tell a `gguf.GGUFWriter` what a model looks like.

    Args:
        writer: The writer.
        config: The model's config.
        heads: Of every layer, 0 where it has no attention.
        key_heads: Of keys and values, likewise; 0 beside heads for a linear layer.
        widths: Of every layer's MLP.
    """
    width = head_width(config)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(heads))
    writer.add_feed_forward_length(_alike(widths))
    writer.add_head_count(_alike(heads))
    writer.add_head_count_kv(_alike(key_heads))
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    full, *others = _ropes(config)
    writer.add_rope_freq_base(full.get("rope_theta", 10000.0))
    if full.get("rope_type", "default") == "linear":
        writer.add_string(f"{writer.arch}.rope.scaling.type", "linear")
        writer.add_rope_scaling_factor(full["factor"])
    if others:
        writer.add_rope_freq_base_swa(others[0].get("rope_theta", 10000.0))
    for name in ("attn", "final"):
        cap = getattr(config, f"{name}_logit_softcapping", None)
        if cap is not None:
            getattr(writer, f"add_{name}_logit_softcapping")(cap)
    if ARCHITECTURES[config.model_type].windows:
        writer.add_sliding_window(config.sliding_window)


def _alike(values: Sequence[int]) -> int | list[int]:
    """One number where all layers have the same, which older readers expect."""
    return values[0] if len(set(values)) == 1 else list(values)

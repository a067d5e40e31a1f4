"""Configs of exported models that are no architecture of transformers, for `register_configs` to register.

`AutoConfig` and engines then read such a folder without code that comes with it. transformers has no models for them:
`from_pretrained` says so instead of making up the weights that are left out.
"""

from __future__ import annotations

from typing import Any

from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)


class NemotronNasConfig(LlamaConfig):
    """A Llama some of whose layers lack attention or MLP, in the vocabulary of DeciLM.

    Attributes:
        block_configs: Of every layer what its `attention` and its `ffn` are, read as attributes, as engines do.
    """

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.block_configs = [
            Block({kind: Block(part) if isinstance(part, dict) else part for kind, part in block.items()})
            for block in block_configs or []
        ]


class Block(dict[str, Any]):
    """An object of JSON whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class SlimLlamaConfig(LlamaConfig):
    """A Llama that slimformer exported; `slimformer_layers` says what is left of every layer."""

    model_type = "slimformer_llama"


class SlimMistralConfig(MistralConfig):
    """A Mistral, likewise."""

    model_type = "slimformer_mistral"


class SlimQwen2Config(Qwen2Config):
    """A Qwen2, likewise."""

    model_type = "slimformer_qwen2"


class SlimQwen3Config(Qwen3Config):
    """A Qwen3, likewise."""

    model_type = "slimformer_qwen3"


class SlimGemma3Config(Gemma3TextConfig):
    """A Gemma 3, likewise."""

    model_type = "slimformer_gemma3_text"


# By the model type of the whole model: the config, and the architecture that the plugin gives vLLM.
SLIM: dict[str, tuple[Any, str]] = {
    "llama": (SlimLlamaConfig, "SlimLlamaForCausalLM"),
    "mistral": (SlimMistralConfig, "SlimMistralForCausalLM"),
    "qwen2": (SlimQwen2Config, "SlimQwen2ForCausalLM"),
    "qwen3": (SlimQwen3Config, "SlimQwen3ForCausalLM"),
    "gemma3_text": (SlimGemma3Config, "SlimGemma3ForCausalLM"),
}
# What the layers of a slim config may be said to hold.
KEPT, DROPPED, MEAN, FILTER = "kept", "dropped", "mean", "filter"


def register_configs() -> None:
    """Let transformers read these configs; as often as one likes."""
    configs: list[Any] = [NemotronNasConfig, *(config for config, _ in SLIM.values())]
    for config in configs:
        AutoConfig.register(config.model_type, config, exist_ok=True)

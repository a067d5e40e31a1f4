"""vLLM's own models with sublayers that are dropped, or replaced by a mean or by a linear layer.

A model is built as vLLM builds it, and then loses what its config says is not there: dropped attentions take no cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import PPMissingLayer

from slimformer.exporting.configs import DROPPED, FILTER, KEPT, MEAN

# Of each sublayer: the module, the norm in front and, in sandwich norms, the one behind.
_PLAIN: dict[str, tuple[str, str, str | None]] = {
    "attention": ("self_attn", "input_layernorm", None),
    "mlp": ("mlp", "post_attention_layernorm", None),
}
_SANDWICH: dict[str, tuple[str, str, str | None]] = {
    "attention": ("self_attn", "input_layernorm", "post_attention_layernorm"),
    "mlp": ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}


class Constant(nn.Module):
    """The mean output of a dropped sublayer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(hidden), requires_grad=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The same for every token."""
        return self.bias.expand_as(hidden_states)


class SlimLayer(nn.Module):
    """What is left of one of vLLM's layers, under the names that its parts had.

    As in vLLM's own, a layer hands on what is still to be added to the residual, and the next norm adds it.

    Attributes:
        left: What is left of `attention` and `mlp`: kept, dropped, mean or filter.
    """

    def __init__(self, layer: nn.Module, left: dict[str, str], hidden: int) -> None:
        super().__init__()
        self.left = left
        self.sandwich = hasattr(layer, "pre_feedforward_layernorm")
        for kind, (module, before, behind) in self._parts().items():
            if left[kind] in (KEPT, FILTER):
                self.add_module(before, layer.get_submodule(before))
            if left[kind] == KEPT:
                for name in (module, behind):
                    if name is not None:
                        self.add_module(name, layer.get_submodule(name))
            elif left[kind] == FILTER:
                self.add_module(f"slimformer_{kind}", nn.Linear(hidden, hidden))
            elif left[kind] == MEAN:
                self.add_module(f"slimformer_{kind}", Constant(hidden))

    def _parts(self) -> dict[str, tuple[str, str, str | None]]:
        return _SANDWICH if self.sandwich else _PLAIN

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """The layer for `hidden_states` `[tokens, hidden]`, to which `residual` is still to be added, if any."""
        for kind, (module, before, behind) in self._parts().items():
            left = self.left[kind]
            if left == DROPPED:
                continue
            if left == MEAN:
                hidden_states = hidden_states + self.get_submodule(f"slimformer_{kind}")(hidden_states)
                continue
            norm = self.get_submodule(before)
            if residual is None:
                hidden_states, residual = norm(hidden_states), hidden_states
            else:
                hidden_states, residual = norm(hidden_states, residual)
            if left == FILTER:
                hidden_states = self.get_submodule(f"slimformer_{kind}")(hidden_states)
            elif kind == "attention":
                hidden_states = self.get_submodule(module)(positions=positions, hidden_states=hidden_states)
            else:
                hidden_states = self.get_submodule(module)(hidden_states)
            if left == KEPT and behind is not None:
                hidden_states = self.get_submodule(behind)(hidden_states)
        return hidden_states, residual


def slim(model: Any, vllm_config: VllmConfig, prefix: str) -> None:
    """Take out of a model what its config says is not there.

    Args:
        model: One of vLLM's, before its weights are loaded.
        vllm_config: Where its attentions are entered, each of which gets a cache.
        prefix: The name of `model` in what vLLM builds.
    """
    config = vllm_config.model_config.hf_config
    entered = vllm_config.compilation_config.static_forward_context
    lead = f"{prefix}." if prefix else ""
    layers = model.model.layers
    for index, left in enumerate(config.slimformer_layers):
        if isinstance(layers[index], PPMissingLayer) or set(left.values()) == {KEPT}:
            continue
        layers[index] = SlimLayer(layers[index], left, config.hidden_size)
        if left["attention"] != KEPT:
            attention = f"{lead}model.layers.{index}.self_attn."
            for name in [name for name in entered if name.startswith(attention)]:
                del entered[name]


class SlimLlamaForCausalLM(LlamaForCausalLM):
    """A Llama of which sublayers are dropped or replaced."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        slim(self, vllm_config, prefix)


class SlimMistralForCausalLM(MistralForCausalLM):
    """A Mistral, likewise."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        slim(self, vllm_config, prefix)


class SlimQwen2ForCausalLM(Qwen2ForCausalLM):
    """A Qwen2, likewise."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        slim(self, vllm_config, prefix)


class SlimQwen3ForCausalLM(Qwen3ForCausalLM):
    """A Qwen3, likewise."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        slim(self, vllm_config, prefix)


class SlimGemma3ForCausalLM(Gemma3ForCausalLM):
    """A Gemma 3, likewise."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        slim(self, vllm_config, prefix)

"""Random-weight Llama models of known shapes, and several on the same weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

import slimformer
from benchmarks.frame.registry import Settings
from slimformer import LayerDrop
from slimformer.model.layer_parts import Kind

DENSE, SLIM, SUBLAYERS = "dense", "16 attentions dropped", "those 16 attention sublayers alone"
Rotary = tuple[Tensor, Tensor]
Model = TypeVar("Model", bound=nn.Module)


def llama_8b(settings: Settings) -> LlamaForCausalLM:
    """Random weights of Llama-3.1-8B's shape."""
    return _llama(settings, (128256, 4096, 14336, 32, 32, 8, 131072), tied=False)


def smollm2_135m(settings: Settings) -> LlamaForCausalLM:
    """Random weights of SmolLM2-135M's shape."""
    return _llama(settings, (49152, 576, 1536, 30, 9, 3, 8192), tied=True)


def _llama(settings: Settings, sizes: tuple[int, ...], *, tied: bool) -> LlamaForCausalLM:
    """In evaluation mode; a tiny one in a smoke run."""
    vocabulary, hidden, intermediate, layers, heads, kv_heads, positions = settings.pick(
        sizes, (64, 64, 64, 4, 4, 2, 64)
    )
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=tied,
    )
    with settings.device:
        model = LlamaForCausalLM._from_config(config, dtype=settings.dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def with_shared_weights(model: Model) -> Model:
    """Another model on the same weights, so that neither has to be patched between two timed calls."""
    # The memo makes the copy share every tensor and have modules of its own.
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


@contextlib.contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """Float32 whose products a GPU rounds to TF32: three more bits than bfloat16 has, at an eighth of the time."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def logits_in_float32(
    model: LlamaForCausalLM,
    ids: Tensor,
    keeps: Callable[[int, Kind], Tensor | None] = lambda layer, kind: None,
    stays: Callable[[int], Tensor | None] = lambda layer: None,
) -> Tensor:
    """Logits of the last token in (fast) float32, layer by layer, every token computed and those that are kept used.

    Thirty-two layers of random weights blow up every rounding, so that two right models in bfloat16 differ by more
    than one wrong row would show: each is compared with this instead.

    Args:
        model: An unpatched model.
        ids: `[batch, tokens]`.
        keeps: Whether each token is computed in a sublayer, bool `[1, tokens, 1]`; None for all.
        stays: Which of the tokens that are left stay from a layer on, sorted indices; None for all.
    """
    stack, positions = model.model, torch.arange(ids.shape[1], device=ids.device)[None]
    with torch.no_grad(), fast_float32(ids.device):
        h = stack.embed_tokens(ids).float()
        rotary = stack.rotary_emb(h, position_ids=positions)
        for index, layer in enumerate(stack.layers):
            wide, stay = copy.deepcopy(layer).float(), stays(index)
            if stay is not None:
                h = h[:, stay]
                rotary = tuple(part[:, stay] for part in rotary)
            y = _attention_in_float32(wide.self_attn, wide.input_layernorm(h), rotary)
            h = _kept(h, y, keeps(index, "attention"))
            h = _kept(h, wide.mlp(wide.post_attention_layernorm(h)), keeps(index, "mlp"))
        logits: Tensor = copy.deepcopy(model.lm_head).float()(copy.deepcopy(stack.norm).float()(h[:, -1:]))
    return logits


def _attention_in_float32(module: modeling_llama.LlamaAttention, h: Tensor, rotary: Rotary) -> Tensor:
    def heads(layer: nn.Module) -> Tensor:
        return layer(h).view(*h.shape[:2], -1, module.head_dim).transpose(1, 2)

    q, k = modeling_llama.apply_rotary_pos_emb(heads(module.q_proj), heads(module.k_proj), *rotary)
    # A copy of the keys per query head: PyTorch would hold all scores otherwise.
    k, v = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (k, heads(module.v_proj)))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y: Tensor = module.o_proj(out.transpose(1, 2).flatten(2))
    return y


def _kept(h: Tensor, y: Tensor, keep: Tensor | None) -> Tensor:
    return h + y if keep is None else torch.where(keep, h + y, h)


class DenseAndSlim:
    """The 8B shape, dense and without half of its attentions, on the same weights.

    Attributes:
        dense: The unpatched model.
        slim: The same with the attentions of `dropped` dropped.
        dropped: The middle half of the layers.
        sublayers: The dropped attentions of the dense model, one behind the other.
    """

    def __init__(self, settings: Settings):
        self.dense = llama_8b(settings)
        layers = len(self.dense.model.layers)
        self.dropped = range(layers // 4, 3 * layers // 4)
        self.slim = with_shared_weights(self.dense)
        slimformer.patch(self.slim, LayerDrop(attention=self.dropped))
        self.sublayers = Sublayers(self.dense.model.layers[index] for index in self.dropped)

    def tokens(self, *shape: int) -> Tensor:
        """Random token ids."""
        return torch.randint(self.dense.config.vocab_size, shape, device=self.dense.device)

    def hidden(self, batch: int, tokens: int) -> Tensor:
        """A random residual stream."""
        size = (batch, tokens, self.dense.config.hidden_size)
        return torch.randn(size, device=self.dense.device, dtype=self.dense.dtype)

    def rotary(self, start: int, tokens: int) -> Rotary:
        """Cosines and sines of the rotary positions from `start` on."""
        positions = torch.arange(start, start + tokens, device=self.dense.device)[None]
        cos, sin = self.dense.model.rotary_emb(self.hidden(1, 1), position_ids=positions)
        return cos, sin

    def in_float32(self, ids: Tensor, dropped: Collection[int]) -> Tensor:
        """Logits of the last token in float32 without some attentions: what the models are judged by."""
        none = torch.zeros(1, 1, 1, dtype=torch.bool, device=ids.device)

        def keeps(layer: int, kind: Kind) -> Tensor | None:
            return none if kind == "attention" and layer in dropped else None

        return logits_in_float32(self.dense, ids, keeps)


class Sublayers(nn.Module):
    """Norm, attention and residual add of some layers, one behind the other, and nothing else."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, h: Tensor, rotary: Rotary, mask: Tensor | None, cache: Cache | None) -> Tensor:
        """The residual `[batch, tokens, hidden]` behind them; keys and values go into the layers' own slots."""
        for layer in self.layers:
            h = _attention(layer, h, rotary, mask, cache)
        return h


def sublayers_in_float32(sublayers: Sublayers, h: Tensor, rotary: Rotary) -> Tensor:
    """What the layers make of the whole residual `[batch, tokens, hidden]` without a cache, in float32."""
    h, rotary = h.float(), (rotary[0].float(), rotary[1].float())
    with torch.no_grad(), fast_float32(h.device):
        for layer in sublayers.layers:
            wide = copy.deepcopy(layer.get_submodule("self_attn")).float()
            norm = copy.deepcopy(layer.get_submodule("input_layernorm")).float()
            h = h + _attention_in_float32(wide, norm(h), rotary)
    return h


def _attention(layer: Any, h: Tensor, rotary: Rotary, mask: Tensor | None, cache: Cache | None) -> Tensor:
    attention = layer.self_attn(
        hidden_states=layer.input_layernorm(h),
        position_embeddings=rotary,
        attention_mask=mask,
        past_key_values=cache,
    )
    out: Tensor = h + attention[0]
    return out


def rewinder(cache: DynamicCache) -> Callable[[], None]:
    """Takes the newest tokens out again: an update makes new tensors and leaves these as they are."""
    filled = [(layer, layer.keys, layer.values) for layer in cache.layers if layer.is_initialized]

    def rewind() -> None:
        for layer, keys, values in filled:
            layer.keys, layer.values = keys, values

    return rewind

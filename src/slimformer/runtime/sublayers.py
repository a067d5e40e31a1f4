"""What is known of a layer's modules, found once when the model is patched: how its sublayers run for chosen rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from slimformer.model.anatomy import attention_core
from slimformer.model.layer_parts import KINDS, Kind, Structure
from slimformer.model.touched_modules import CalledModules, is_untouched, takes_rows
from slimformer.rows.attention import RowAttention
from slimformer.rows.mlp import GatedMlp
from slimformer.rows.norms import RowNorms
from slimformer.rows.stream import Stream
from slimformer.runtime.sublayer import Sublayer, norm_names
from slimformer_kernels.dispatch import HAS_TRITON, KERNEL_DTYPES

# Below this many numbers in the residual a GPU waits for the CPU: what counts is how many kernels are launched, not
# what they do (SmolLM2's MLP at 4096 tokens on an H100: 0.2 ms launched one by one, 0.1 ms from a CUDA graph).
KERNELS_FROM_ELEMENTS = 2**22


@dataclass
class RowSublayers:
    """What is known about a layer's modules.

    Attributes:
        layer: The layer, whose parts are looked up anew in every call.
        structure: The row of the structure table that says what the parts are.
        causal: Whether the model is a decoder.
        attention: Runs the attention for chosen rows; None where its module fits no row of the table.
        gated: The fused form of the MLP, if it is a gated one.
        counted: Whether the layer runs before the cache counts a call's tokens.
        stack: The modules of all layers of the model.
        norms: The norms among the layer's children.
        sublayers: What each sublayer computes.
    """

    layer: nn.Module
    structure: Structure
    causal: bool
    attention: RowAttention | None = None
    gated: GatedMlp | None = None
    counted: bool = False
    stack: tuple[CalledModules, ...] = field(default=(), repr=False)
    norms: RowNorms = field(init=False)
    sublayers: dict[Kind, Sublayer] = field(init=False)

    def __post_init__(self) -> None:
        self.norms = RowNorms(self.layer, norm_names(self.structure))
        self.sublayers = {kind: Sublayer(self.layer, self.structure, kind, self.norms) for kind in KINDS}

    def renewed(self, counted: bool) -> RowSublayers:
        """The same for the modules as they are now.

        Args:
            counted: Whether the layer runs before the cache counts a call's tokens.
        """
        attention = None if self.attention is None else replace(self.attention)
        return replace(self, attention=attention, counted=counted)

    def cached_tokens(self, cache: Cache | None, earlier: int | Tensor) -> int | Tensor:
        """How many tokens this layer's slot of the cache holds.

        Args:
            cache: The cache.
            earlier: How many came in earlier calls, for slots that hold no keys of their own.
        """
        core = attention_core(self.layer, self.structure) if self.attention is None else self.attention.core
        slot = getattr(core, "layer_idx", None)
        if cache is None or slot is None:
            return 0
        if slot < len(cache.layers) and not isinstance(cache.layers[slot], (DynamicLayer, StaticLayer)):
            return earlier
        return cache.get_seq_length(slot)

    def earlier_tokens(self, cache: Cache | None, tokens: int) -> int | Tensor:
        """How many tokens came in earlier calls, by the first slot of the cache, from which no token leaves."""
        if cache is None:
            return 0
        return cache.get_seq_length() - (0 if self.counted else tokens)

    def looked_into(self) -> bool:
        """Whether somebody has touched a module of any layer, who is to see all tokens of the batch."""
        return any(modules.touched() for modules in self.stack)

    def may_be_skipped(self, x: Tensor) -> bool:
        """Whether a sublayer of a step of the rows `x` `[rows, hidden]` reads no weights where none is wanted."""
        attention, gated = self.attention, self.gated
        if attention is not None and attention.may_be_skipped(x):
            return True
        return gated is not None and gated.may_be_skipped(x)

    def heads_input(self, stream: Stream, x: Tensor) -> Tensor:
        """What the attention's heads are made of, of the rows `x` `[rows, hidden]` of a stream, by the norm itself."""
        return self.sublayers["attention"].heads_input(x, None, stream, kernels=False)

    def scores(self, kind: Kind, stream: Stream, x: Tensor, router: Tensor, bias: Tensor) -> Tensor:
        """The input of a sublayer's module times `router` `[hidden]`, plus `bias` `[1]`: float32 `[rows]`."""
        norm = self.sublayers[kind].parts.norm_before
        if norm is not None:
            module = getattr(self.layer, norm)
            if not (is_untouched(module) or takes_rows(module)):
                x = stream.in_the_batch(module, x)
            elif x.is_cuda:
                return self.norms.scores(norm, x, router, bias)
            else:
                x = module(x)
        return (x.float() * router.float()).sum(-1) + bias.float()


def uses_kernels(x: Tensor, layer: nn.Module) -> bool:
    """Whether a call on the residual `x` runs kernels, which know no gradients and no dropout.

    A compiled graph has its own; where the CPU is what takes the time, only a CUDA graph profits from ours. Graphs are
    warmed up and captured off the default stream.
    """
    if not x.is_cuda or layer.training or not HAS_TRITON or torch.is_grad_enabled():
        return False
    if (
        torch.compiler.is_compiling()
        or x.dtype not in KERNEL_DTYPES
        or torch.is_autocast_enabled(x.device.type)
    ):
        return False
    return x.numel() >= KERNELS_FROM_ELEMENTS or torch.cuda.current_stream(x.device).cuda_stream != 0

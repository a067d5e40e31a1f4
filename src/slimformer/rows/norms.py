"""Norms of chosen rows: the kernel where a norm module is one that a kernel computes, else the module itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from slimformer.model.touched_modules import as_it_was_built, is_untouched
from slimformer_kernels import add_layer_norm, add_rms_norm, layer_norm_rows, rms_norm_rows, router_scores
from slimformer_kernels.rms_norm_rows import rms_norm_rows_reference

# A pass over memory of fewer numbers takes less time than the longer launch of a Triton kernel (H100: 8 us, 50 us);
# encoders of BERT's size wait for the CPU.
FUSED_FROM_ELEMENTS = 2**23


class RmsNorm(NamedTuple):
    """How an RMSNorm module computes."""

    eps: float
    offset: float
    multiply_in_fp32: bool


@dataclass
class RowNorms:
    """Some norms among a module's children, examined once.

    Attributes:
        owner: The module that holds them, where they are looked up in every call.
        names: Which of its children.
        kinds: What each computes, where a kernel does the same.
    """

    owner: nn.Module
    names: tuple[str, ...]
    kinds: dict[str, RmsNorm | nn.LayerNorm | None] = field(init=False)

    def __post_init__(self) -> None:
        self.kinds = {name: examine(as_it_was_built(getattr(self.owner, name))) for name in self.names}
        self.examined = {name: type(getattr(self.owner, name)) for name in self.names}

    def kind(self, name: str, norm: nn.Module) -> RmsNorm | nn.LayerNorm | None:
        """What a norm computes; None where it is another than was examined, or somebody has touched it."""
        return self.kinds[name] if type(norm) is self.examined[name] and is_untouched(norm) else None

    def __call__(self, name: str, x: Tensor, index: Tensor | None, kernels: bool) -> Tensor:
        """Norm `x[index]` `[kept, hidden]`, or all of `x` `[rows, hidden]`."""
        norm = getattr(self.owner, name)
        kind = self.kind(name, norm) if kernels else None
        if isinstance(kind, RmsNorm):
            return rms_norm_rows(
                x,
                index,
                norm.weight,
                kind.eps,
                offset=kind.offset,
                multiply_in_fp32=kind.multiply_in_fp32,
            )
        if kind is not None:
            return layer_norm_rows(x, index, norm.weight, norm.bias, norm.eps)
        chosen = x if index is None else x.index_select(0, index)
        normed: Tensor = norm(chosen)
        return normed

    def scores(self, name: str, x: Tensor, router: Tensor, bias: Tensor) -> Tensor:
        """The norm of `x` `[rows, hidden]` times `router` `[hidden]`, plus `bias` `[1]`: float32 `[rows]`."""
        norm = getattr(self.owner, name)
        kind = self.kind(name, norm)
        if isinstance(kind, RmsNorm) and x.is_cuda:
            return router_scores(
                x,
                norm.weight,
                kind.eps,
                router,
                bias,
                offset=kind.offset,
                multiply_in_fp32=kind.multiply_in_fp32,
            )
        return (norm(x).float() * router.float()).sum(-1) + bias.float()

    def fused(self, name: str, x: Tensor) -> Tensor:
        """The norm of `x` `[..., hidden]` by PyTorch's own kernel, where it computes the same in one launch."""
        norm = getattr(self.owner, name)
        kind = self.kind(name, norm)
        if isinstance(kind, RmsNorm) and kind.offset == 0.0 and norm.weight.dtype == x.dtype:
            return torch.rms_norm(x, norm.weight.shape, norm.weight, kind.eps)
        normed: Tensor = norm(x)
        return normed

    def after_addition(self, name: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """`x + y` and its norm, in one pass over memory where a kernel can."""
        norm = getattr(self.owner, name)
        kind = self.kind(name, norm)
        if isinstance(kind, RmsNorm):
            return add_rms_norm(
                x, y, norm.weight, kind.eps, offset=kind.offset, multiply_in_fp32=kind.multiply_in_fp32
            )
        if kind is not None and x.numel() >= FUSED_FROM_ELEMENTS:
            return add_layer_norm(x, y, norm.weight, norm.bias, norm.eps)
        total = x + y
        return total, norm(total)


@torch.no_grad()
def examine(norm: nn.Module) -> RmsNorm | nn.LayerNorm | None:
    """Which kernel computes what a norm module does, found by comparing outputs; None if none does."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or weight.is_meta or hasattr(norm, "_hf_hook"):
        return None
    if type(norm) is nn.LayerNorm:
        return norm
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(eps, float):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, weight.shape[0], generator=generator, device="cpu").to(weight)
    expected = norm(x)
    if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return None
    kinds = [RmsNorm(eps, offset, fp32) for offset in (0.0, 1.0) for fp32 in (False, True)]

    def error(kind: RmsNorm) -> float:
        actual = rms_norm_rows_reference(x, None, weight, kind.eps, kind.offset, kind.multiply_in_fp32)
        return float((actual.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))

    best = min(kinds, key=error)
    return best if error(best) <= (1e-5 if x.dtype == torch.float32 else 4e-3) else None

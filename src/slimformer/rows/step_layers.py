"""Linear layers of a decode step's few rows, with the norm in front and what comes behind in the same launch."""

from __future__ import annotations

from typing import TypeGuard

from torch import Tensor, nn

from slimformer.cache.steps import Step, current_step
from slimformer.model.touched_modules import is_untouched
from slimformer.rows.norms import RmsNorm, RowNorms
from slimformer_kernels import step_linear_added
from slimformer_kernels.step_linear import InputNorm

# cuBLAS is faster for several: a step of four rows of Qwen2.5-1.5B's shape takes an H200 2.4 ms with it, 2.8 without.
_FEW = 1


def step_of_few(x: Tensor) -> Step | None:
    """The step that is being prepared, if the rows `x` `[rows, hidden]` are few enough for these."""
    step = current_step()
    return step if step is not None and x.shape[0] <= _FEW else None


def is_plain(layer: object, x: Tensor) -> TypeGuard[nn.Linear]:
    """Whether a layer is its weight and its bias, and nothing else that might be called instead."""
    if type(layer) is not nn.Linear or not is_untouched(layer):
        return False
    return (layer.weight.dtype, layer.weight.device) == (x.dtype, x.device)


def added(layer: object, x: Tensor, y: Tensor) -> Tensor | None:
    """The residual `x` `[rows, hidden]` plus a layer of `y`; None where it is no plain one."""
    return step_linear_added(x, y, layer.weight, layer.bias) if is_plain(layer, y) else None


def input_norm(norms: RowNorms, name: str, x: Tensor) -> InputNorm | None:
    """A norm as these layers take it in front of them; None where it is of another kind, or somebody has touched it."""
    norm = getattr(norms.owner, name)
    kind = norms.kind(name, norm)
    if not isinstance(kind, RmsNorm) or (norm.weight.dtype, norm.weight.device) != (x.dtype, x.device):
        return None
    return InputNorm(norm.weight, kind.eps, kind.offset)

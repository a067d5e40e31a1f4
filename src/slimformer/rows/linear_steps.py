"""Linear layers of a decode step whose tokens may all pass a sublayer by: then a GPU reads no weight.

Whether any does, the device alone knows. Where the answer is at hand, the whole sublayer is left out instead.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slimformer.model.touched_modules import is_untouched
from slimformer_kernels import linear_if_any
from slimformer_kernels.dispatch import HAS_TRITON, KERNEL_DTYPES
from slimformer_kernels.linear_if_any import MOST_ROWS

# A GPU reads fewer weights in less time than a launch takes, and nothing is gained.
_FROM_WEIGHTS = 2**22


def may_be_skipped(layer: object, x: Tensor) -> bool:
    """Whether `linear_if_any` stands for a layer on the rows `x` `[rows, in]`, and may gain something there."""
    if type(layer) is not nn.Linear or not is_untouched(layer):
        return False
    if x.shape[0] > MOST_ROWS or layer.weight.dtype != x.dtype or layer.weight.device != x.device:
        return False
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    return x.is_cuda and HAS_TRITON and x.dtype in KERNEL_DTYPES and layer.weight.numel() >= _FROM_WEIGHTS


def linear_step(layer: nn.Module, x: Tensor, wanted: Tensor | None) -> Tensor:
    """A layer on the rows `x` `[rows, in]`, of which those in `wanted`, bool `[rows]`, count; None for all."""
    if wanted is not None and isinstance(layer, nn.Linear) and may_be_skipped(layer, x):
        return linear_if_any(x, layer.weight, layer.bias, wanted)
    y: Tensor = layer(x)
    return y

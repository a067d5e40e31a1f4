"""What a CPU holds a checkpoint in: half precision only where it multiplies half precision fast."""

from __future__ import annotations

import logging
from typing import Any

import torch

_logger = logging.getLogger("slimformer")
# What PyTorch itself asks before it hands a product to oneDNN; without oneDNN it multiplies element by element.
_QUESTIONS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for matrices of a dtype and PyTorch uses them.

    bfloat16 needs AVX-512 or its like on x86 and the bf16 extension on ARM; float16 needs AVX-512 FP16. PyTorch's
    builds for Apple's processors have neither. Elsewhere such a product takes four to a hundred times as long as one
    in float32.

    Example:
        >>> multiplies_fast(torch.float32)
        True
    """
    if dtype not in _QUESTIONS:
        return True
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    # There is no public name for it; one that has gone means that nobody knows, and float32 is never wrong.
    ask = getattr(torch.ops.mkldnn, _QUESTIONS[dtype], None)
    return ask is not None and bool(ask())


def in_fast_dtype(model: Any, name: str) -> Any:
    """The model as it is or, on a CPU that multiplies its half precision slowly, in float32, which one line says.

    Args:
        model: A model that was loaded in its checkpoint's own dtype, with its weights where they are to stay.
        name: What the line calls it.
    """
    slow = {
        weight.dtype
        for weight in model.parameters()
        if weight.device.type == "cpu" and not multiplies_fast(weight.dtype)
    }
    # Packed weights keep the dtype that their scales belong to.
    if not slow or any(getattr(module, "hf_quantizer", None) is not None for module in model.modules()):
        return model
    stored = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in slow))
    _logger.info(
        "%s is stored in %s, which this CPU multiplies slowly: computing in float32. --dtype %s keeps it.",
        name,
        stored,
        stored.split()[0],
    )
    return model.float()

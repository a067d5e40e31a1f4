"""Which of PyTorch's exact attention backends runs a prefill.

PyTorch itself prefers cuDNN on Hopper, which is 1.4 to 2 times as fast as its flash backend and builds a plan of 65
milliseconds for every new shape (H100, torch 2.11). A prompt of a length not seen before is then slower by that time,
more than attention saves unless the prompt is long. So a shape starts with flash and moves to cuDNN when its calls
would have saved the plan's time.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

# Measured on an H100: the time to build a plan, and causal attention per second, bf16, head size 128.
_PLAN_SECONDS = 65e-3
_FLASH, _CUDNN = 330e12, 600e12
_HOPPER = 9
# What a shape would have saved so far, in seconds, by shape.
_saved: dict[Any, float] = defaultdict(float)
# Shapes with which cuDNN has run.
_planned: set[Any] = set()


def fastest_backend(query: Tensor, key: Tensor, mask: Any) -> contextlib.AbstractContextManager[Any]:
    """A context in which PyTorch runs the exact backend that is fastest for this shape, over all its calls.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`.
        mask: The attention mask, or None.

    Returns:
        A context that changes nothing where PyTorch's own choice is as good: with a mask, for a single query, off a
        Hopper GPU, or in a compiled graph.
    """
    if mask is not None or query.shape[2] == 1 or not query.is_cuda or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    if torch.cuda.get_device_capability(query.device)[0] != _HOPPER or query.dtype == torch.float32:
        return contextlib.nullcontext()
    batch, heads, queries, head_dim = query.shape
    shape = (query.device, query.dtype, query.shape, query.stride(), key.shape)
    if torch.cuda.is_current_stream_capturing():
        # A plan cannot be built while a graph is captured.
        return contextlib.nullcontext() if shape in _planned else without_cudnn
    work = 2 * batch * heads * queries * key.shape[2] * head_dim
    _saved[shape] += work / _FLASH - work / _CUDNN
    if _saved[shape] < _PLAN_SECONDS:
        return without_cudnn
    _planned.add(shape)
    return contextlib.nullcontext()


class WithoutCudnn:
    """Blocks in which cuDNN is off; the switch is the process's own, so the last of several threads puts it back."""

    def __init__(self) -> None:
        self.lock, self.open, self.before = threading.Lock(), 0, True

    def __enter__(self) -> None:
        # torch.nn.attention.sdpa_kernel does the same in 50 microseconds per call.
        with self.lock:
            if self.open == 0:
                self.before = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self.open += 1

    def __exit__(self, *raised: object) -> None:
        with self.lock:
            self.open -= 1
            if self.open == 0:
                torch.backends.cuda.enable_cudnn_sdp(self.before)


without_cudnn = WithoutCudnn()

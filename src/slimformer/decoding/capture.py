"""From a call to a CUDA graph of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Kernels are compiled and libraries allocate what they need in calls before.
_WARM_UPS = 2
_CAPTURES = {"cuda": torch.cuda.is_available}


def captures(kind: str) -> bool:
    """Whether calls can be captured on a kind of device, such as `"cuda"`."""
    return kind in _CAPTURES and _CAPTURES[kind]()


def may_capture() -> bool:
    """Whether there is any device of this kind."""
    return any(map(captures, _CAPTURES))


def capture(
    call: Callable[[], Tensor], rewind: Callable[[], None], device: torch.device, pool: Any
) -> tuple[Callable[[], None], Tensor]:
    """Capture what a call launches.

    Args:
        call: Launches the same, at the same addresses, every time.
        rewind: Lets the next call do what the last one did.
        device: On which device.
        pool: Of memory, shared by graphs of which one runs at a time; from `memory_pool`.

    Returns:
        What launches it again, and the call's result, which is written anew each time.

    Raises:
        RuntimeError: If something in it cannot be captured.
    """
    rewind()
    if device.type != "cuda":
        found = call()
        return (lambda: _again(call, found)), found
    stream = _stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            rewind()
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on using the GPU. A capture that fails raises before it leaves its stream.
    with (
        torch.cuda.stream(torch.cuda.current_stream(device)),
        torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
    ):
        result = call()
    return functools.partial(_replay, graph, stream), result


def _replay(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """Launch a graph where no other runs: all of a device work in the same memory of libraries."""
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        graph.replay()
    current.wait_stream(stream)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a device: libraries keep memory for every stream that they have ever run on."""
    return torch.cuda.Stream(device)


def _again(call: Callable[[], Tensor], found: Tensor) -> None:
    found.copy_(call())


def memory_pool(device: torch.device) -> Any:
    """Memory for graphs of which one runs at a time."""
    return torch.cuda.graph_pool_handle() if device.type == "cuda" else None

"""Where a call runs: the Triton kernel, or the PyTorch reference that stands beside it.

A public function takes its kernel when Triton can be imported, the input lies on a CUDA device, its dtype is
float32, bfloat16 or float16, and no gradient has to flow. Everything else runs the reference, which is
ordinary differentiable PyTorch. With ``TRITON_INTERPRET=1`` (set before Triton is imported) the kernels also
run on CPU tensors, but only when a test calls the registered operator itself: public functions never choose
the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

__all__ = ["HAS_TRITON", "KERNEL_DTYPES", "jit", "kernel_op", "runs_kernel", "tl", "triton", "wrap_triton"]

HAS_TRITON = triton is not None
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def jit(kernel: Callable[..., Any]) -> Any:
    """``triton.jit``, or the plain (never called) function on a machine without Triton."""
    return triton.jit(kernel) if HAS_TRITON else kernel


class KernelOp:
    """A launch function that is also the registered operator ``slimformer_kernels::<name>``.

    A direct call launches: going through the dispatcher costs several times what the launch itself does, and
    small models wait for the CPU. Wherever something watches the operators (``torch.compile``, export, fake
    tensors) the registered operator is called, so that it is seen.
    """

    def __init__(self, launch: Callable[..., Any], registered: Any):
        self.launch, self.registered = launch, registered
        self.__doc__ = launch.__doc__

    def __call__(self, *arguments: Any) -> Any:
        return self.registered(*arguments) if watched() else self.launch(*arguments)


def kernel_op(name: str, *, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register a launch function as the operator ``slimformer_kernels::<name>``.

    ``triton_op`` takes the launch function itself as the fake implementation, so that ``torch.compile`` and
    CUDA graph capture see through to the Triton kernel. Without Triton nothing is registered.
    """
    if not HAS_TRITON:
        return lambda launch: launch
    register = torch.library.triton_op(f"slimformer_kernels::{name}", mutates_args=mutates)
    return lambda launch: KernelOp(launch, register(launch))


def watched() -> bool:
    """Say whether operators are being traced or replaced rather than run."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def wrap_triton(kernel: Any) -> Any:
    """``torch.library.wrap_triton`` where a kernel is traced; elsewhere the kernel itself.

    Older PyTorch refuses to wrap an interpreted kernel. The name is PyTorch's on purpose: its compile cache
    finds the kernels of an operator by that name.
    """
    traced = watched() and isinstance(kernel, triton.runtime.JITFunction)
    return torch.library.wrap_triton(kernel) if traced else kernel


def runs_kernel(x: Tensor, *others: Tensor | None) -> bool:
    """Say whether a public call on ``x`` (and its other floating-point inputs) runs the Triton kernel."""
    if not (HAS_TRITON and x.is_cuda and x.dtype in KERNEL_DTYPES):
        return False
    if not torch.is_grad_enabled():
        return True
    return not (x.requires_grad or any(t is not None and t.requires_grad for t in others))

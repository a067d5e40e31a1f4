"""Compiles every kernel for a GPU that need not be there: `python compile_examples.py`, without Triton's interpreter.

The interpreter runs what the compiler refuses, a name that changes its type for one. Every public function's own
example is called, and a few calls more; where a kernel would be launched, it is compiled for these arguments.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import io
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import slimformer_kernels
from slimformer_kernels import pooled_scores, self_extend

# An H100.
TARGET = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
MODULES = [
    importlib.import_module(f"slimformer_kernels.{found.name}")
    for found in pkgutil.iter_modules(slimformer_kernels.__path__)
]
compiled: set[str] = set()


class Compiler:
    """In the place of a kernel: a launch compiles it."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, *arguments: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        """Compile for these arguments."""
        given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = given[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[parameter.name] = POINTERS[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(self.kernel, signature, constants)
        triton.compile(source, target=TARGET, options={"num_warps": num_warps, "num_stages": num_stages})
        compiled.add(self.kernel.__name__)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """A block in which public functions compile their kernels, on whatever device their tensors are."""
    places = [
        (module, name, stand_in)
        for module in MODULES
        for name, stand_in in (("runs_kernel", lambda *tensors: True), ("wrap_triton", Compiler))
        if hasattr(module, name)
    ]
    before = [getattr(module, name) for module, name, _ in places]
    for module, name, stand_in in places:
        setattr(module, name, stand_in)
    try:
        yield
    finally:
        for (module, name, _), was in zip(places, before, strict=True):
            setattr(module, name, was)


def run_examples() -> None:
    """Everything but what examples expect: nothing has been computed."""
    for name in slimformer_kernels.__all__:
        function = getattr(slimformer_kernels, name)
        for found in doctest.DocTestFinder(recurse=False).find(function, name):
            for example in found.examples:
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(example.source, name, "single"), found.globs)


def run_others() -> None:
    """Blocks as large as the kernel takes; SelfExtend of prompts, both ways, and of more new tokens than one merges."""
    pooled_scores(torch.zeros(1, 4, 80, 32), torch.zeros(1, 2, 80, 32), block=64)
    for queries, causal in ((70, True), (70, False), (9, True)):
        query = torch.zeros(queries, 4, 32, dtype=torch.bfloat16)
        key = torch.zeros(1, 80, 2, 32, dtype=torch.bfloat16)
        self_extend(
            query,
            key,
            key,
            torch.ones(12),
            positions=torch.arange(80 - queries, 80),
            query_offsets=torch.tensor([0, queries]),
            key_ranges=torch.tensor([[0, 80]]),
            longest=queries,
            causal=causal,
            scale=0.2,
            group=3,
            window=16,
            softcap=20.0 if causal else None,
        )


def main() -> None:
    """Raise where a kernel does not compile or was not reached."""
    with compiling():
        run_examples()
        run_others()
    kernels = {
        name
        for module in MODULES
        for name, found in vars(module).items()
        if isinstance(found, triton.JITFunction) and name.endswith("_kernel")
    }
    if kernels - compiled:
        raise SystemExit(f"no call reached {', '.join(sorted(kernels - compiled))}")
    print(f"{len(compiled)} kernels compiled")


if __name__ == "__main__":
    main()

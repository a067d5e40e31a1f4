"""Which benchmarks and tables there are, and what a benchmark is told when it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from benchmarks.results import Measurement

Value = TypeVar("Value")
Run = Callable[["Settings"], Iterator[Measurement]]
Render = Callable[[dict[str, Any]], str]

MODULES = (
    "mlp_rows",
    "row_kernels",
    "attention_backends",
    "layer_drop",
    "layer_drop_compiled",
    "drop_table",
    "encoder_drop",
    "elastic",
    "encode",
    "encode_corpora",
    "lossless",
    "executor_rows",
    "elimination_speed",
    "elimination_quality",
    "elimination_repair",
    "encoder_elimination",
    "long_retrieval",
    "context_extension",
    "self_extend_speed",
    "repair",
    "encoder_repair",
    "encoder_narrow",
    "arank",
    "mixture_of_depths",
    "mixture_of_depths_speed",
)
BENCHMARKS: dict[str, Benchmark] = {}
TABLES: dict[str, Table] = {}


class MissingInput(Exception):
    """A benchmark was asked for without the file or folder it needs."""


@dataclass(frozen=True)
class Settings:
    """What a run is given.

    Attributes:
        device: Where to measure.
        smoke: Tiny sizes: every line runs, and no time means anything.
        data: Folder of the data sets, for benchmarks that read text.
        model: Folder of a checkpoint, for benchmarks that need real weights.
        texts: How many texts per point, for benchmarks that can do with fewer; None for all.
        plans: Folder in which benchmarks that train keep their plans; those found there are not made again.
        only: The one setting to measure, for benchmarks that train several.
    """

    device: torch.device
    smoke: bool = False
    data: Path | None = None
    model: Path | None = None
    texts: int | None = None
    plans: Path | None = None
    only: str | None = None

    def pick(self, full: Value, tiny: Value) -> Value:
        """`tiny` in a smoke run, else `full`."""
        return tiny if self.smoke else full

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations: bfloat16 on a GPU, float32 where only the code is tried out."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def tolerance(self) -> float:
        """Largest relative error of a kernel in that dtype."""
        return 1e-2 if self.dtype == torch.bfloat16 else 1e-5


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark."""

    name: str
    needs: Literal["cuda", "any"]
    description: str
    run: Run


@dataclass(frozen=True)
class Table:
    """A Markdown table made from the results of one benchmark."""

    name: str
    source: str
    render: Render


def benchmark(name: str, *, needs: Literal["cuda", "any"], description: str) -> Callable[[Run], Run]:
    """Register a function that yields measurements."""

    def register(run: Run) -> Run:
        BENCHMARKS[name] = Benchmark(name, needs, description, run)
        return run

    return register


def table(name: str, *, source: str) -> Callable[[Render], Render]:
    """Register a function that turns the results of the benchmark `source` into Markdown."""

    def register(render: Render) -> Render:
        TABLES[name] = Table(name, source, render)
        return render

    return register


def load() -> None:
    """Import every benchmark's module, which registers it."""
    for module in MODULES:
        importlib.import_module(f"benchmarks.{module}")

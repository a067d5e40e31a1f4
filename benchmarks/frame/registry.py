"""Which benchmarks and tables there are, what each needs, and what it is told when it runs."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from benchmarks.frame.results import Measurement

Value = TypeVar("Value")
Run = Callable[["Settings"], Iterator[Measurement]]
Render = Callable[[dict[str, Any]], str]
# "any" runs on a GPU where there is one.
Device = Literal["GPU", "CPU", "any"]
Model = Literal["decoder", "instruction-tuned decoder", "embedding model"]

BENCHMARKS: dict[str, Benchmark] = {}
TABLES: dict[str, Table] = {}
# One for each question.
_FOLDERS = ("kernels", "speed", "quality", "long_context", "embeddings")
# What the published results were measured with.
_PUBLISHED: dict[Model, str] = {
    "decoder": "SmolLM2-135M",
    "instruction-tuned decoder": "SmolLM2-135M-Instruct",
    "embedding model": "all-MiniLM-L6-v2",
}


@dataclass(frozen=True)
class Settings:
    """What a run is given; a benchmark finds what it declared that it needs.

    Attributes:
        device: Where to measure.
        smoke: Tiny sizes: every line runs, and no time means anything.
        data: Folder of the data sets.
        model: A checkpoint's folder or a GGUF file.
        texts: How many texts per point; None for all.
        plans: Folder in which benchmarks that train keep their plans; those found there are not made again.
        only: What to measure of a benchmark that has several parts; None for all.
        training: Minutes that each training may take; None for as long as it takes by default.
    """

    device: torch.device
    smoke: bool = False
    data: Path = Path()
    model: Path = Path()
    texts: int | None = None
    plans: Path = Path()
    only: str | None = None
    training: float | None = None

    def pick(self, full: Value, tiny: Value) -> Value:
        """`tiny` in a smoke run, else `full`."""
        return tiny if self.smoke else full

    def wants(self, part: str) -> bool:
        """Whether a part is to be measured."""
        return self.only is None or self.only in part

    def chosen(self, parts: Sequence[str]) -> list[str]:
        """Those of the parts that are to be measured: of these names, or else with that in their names.

        Example:
            >>> parts = ["drop-7", "drop-7-repaired", "dense"]
            >>> [Settings(torch.device("cpu"), only=only).chosen(parts) for only in ("drop-7", "7", "dense,drop-7")]
            [['drop-7'], ['drop-7', 'drop-7-repaired'], ['drop-7', 'dense']]
        """
        if self.only is None:
            return list(parts)
        names = [self.only] if self.only in parts else self.only.split(",")
        if set(names) <= set(parts):
            return [part for part in parts if part in names]
        return [part for part in parts if self.wants(part)]

    @property
    def on_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations: bfloat16 on a GPU, float32 where only the code is tried out."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def tolerance(self) -> float:
        """Largest relative error of a kernel in that dtype."""
        return 1e-2 if self.dtype == torch.bfloat16 else 1e-5


@dataclass(frozen=True)
class Benchmark:
    """A registered benchmark.

    Attributes:
        name: Of the benchmark and of its result file.
        description: What it measures.
        run: Yields measurements.
        on: Where it runs.
        model: What `--model` has to be; None where it makes its own.
        data: What the folder `--data` has to hold: files, or folders with a slash behind them.
        parts: Of which `--only` may choose.
        takes: Further options: "texts", "plans", "training".
    """

    name: str
    description: str
    run: Run
    on: Device
    model: Model | None = None
    data: Sequence[str] = ()
    parts: Sequence[str] = ()
    takes: Sequence[str] = ()

    def needs(self) -> Iterator[str]:
        """The hardware, the model, the data, and which options there are: a line each."""
        yield {"GPU": "needs a GPU", "CPU": "runs on the CPU", "any": "runs on a GPU or the CPU"}[self.on]
        if self.model is not None:
            yield f"--model: a checkpoint folder, {self.model} ({_PUBLISHED[self.model]})"
        if self.data:
            yield f"--data: a folder with {', '.join(self.data)}"
        if self.parts:
            yield f"--only: {', '.join(self.parts)}"
        if self.takes:
            yield f"takes {', '.join(f'--{name}' for name in self.takes)}"

    def missing(self, settings: Settings, given: Sequence[str]) -> Iterator[str]:
        """What a run lacks, each as a sentence without its subject; `given` names the options that were given."""
        if self.on == "GPU" and not settings.on_gpu and not settings.smoke:
            yield "needs a GPU, and PyTorch finds none; --smoke tries its code at tiny sizes on the CPU"
        if self.model is not None and not settings.smoke:
            if "model" not in given:
                yield f"needs --model, a checkpoint folder: {self.model} ({_PUBLISHED[self.model]})"
            elif not settings.model.exists():
                yield f"needs --model, and {settings.model} does not exist"
        if self.data and not settings.smoke:
            if "data" not in given:
                yield f"needs --data, a folder with {', '.join(self.data)}"
            elif absent := [name for name in self.data if not (settings.data / name).exists()]:
                yield f"needs --data, and {settings.data} lacks {', '.join(absent)}"
        if "texts" in self.takes and settings.texts is not None and settings.texts < 1:
            yield f"needs --texts of at least 1, got {settings.texts}"
        if "training" in self.takes and settings.training is not None and not settings.training > 0:
            yield f"needs --training of more than 0 minutes, got {settings.training}"

    def refused(self, settings: Settings, given: Sequence[str]) -> Iterator[str]:
        """Options that were given and mean nothing here."""
        for name in ("texts", "plans", "training"):
            if name in given and name not in self.takes:
                yield f"takes no --{name}"
        if settings.only is not None and not settings.chosen(self.parts):
            allowed = f"one of {', '.join(self.parts)}" if self.parts else "no --only"
            yield f"takes {allowed}, got --only {settings.only}"


@dataclass(frozen=True)
class Table:
    """A Markdown table made from the results of one benchmark."""

    name: str
    source: str
    render: Render


def benchmark(
    name: str,
    description: str,
    *,
    on: Device = "any",
    model: Model | None = None,
    data: Sequence[str] = (),
    parts: Sequence[str] = (),
    takes: Sequence[str] = (),
) -> Callable[[Run], Run]:
    """Register a function that yields measurements; what it needs is as in `Benchmark`."""

    def register(run: Run) -> Run:
        BENCHMARKS[name] = Benchmark(name, description, run, on, model, data, parts, takes)
        return run

    return register


def table(name: str, *, source: str | None = None) -> Callable[[Render], Render]:
    """Register a function that turns the results of a benchmark, by default of the same name, into Markdown."""

    def register(render: Render) -> Render:
        TABLES[name] = Table(name, source or name, render)
        return render

    return register


def load() -> None:
    """Import every module of every question's folder, which registers its benchmarks."""
    for folder in _FOLDERS:
        package = importlib.import_module(f"benchmarks.{folder}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")

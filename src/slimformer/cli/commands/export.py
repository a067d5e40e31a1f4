"""`slimformer export`: write what other engines load."""

# Commands import torch when they run, so that --help does not wait for it.
# ruff: noqa: PLC0415

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from slimformer.cli import options
from slimformer.cli.output import note


class To(str, Enum):
    """For what is exported, as `slimformer.exporting.export.To`, whose module imports torch."""

    checkpoint = "checkpoint"
    vllm = "vllm"
    onnx = "onnx"
    gguf = "gguf"


class Dtype(str, Enum):
    """Of the weights in a GGUF file, as `slimformer.exporting.gguf.weights.Dtype`."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


def export(
    model: options.Model,
    plan: options.PlanPath,
    output: options.Output,
    to: Annotated[
        To,
        typer.Option(
            help="checkpoint: an ordinary one with fewer layers where PLAN drops blocks, for whatever loads MODEL, "
            "else nemotron-nas. vllm: the same, or what slimformer's plugin lets vLLM serve. gguf: for llama.cpp. "
            "onnx: the graph of an encoder."
        ),
    ] = To.checkpoint,
    quantize: Annotated[
        str | None,
        typer.Option(
            metavar="RECIPE",
            show_default=False,
            help="onnx in int8: int8 for the processor of this machine, or avx2, avx512, avx512_vnni, arm64.",
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights in a GGUF file; left out, as in MODEL.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the earlier export in the folder.")] = False,
) -> None:
    """Write MODEL as PLAN leaves it, for engines that know nothing of slimformer; repair's changes are merged.

    MODEL is read tensor by tensor, so that it may be larger than memory.
    """
    import slimformer

    done = slimformer.export(
        model,
        plan,
        output,
        to.value,
        force=force,
        quantize=quantize,
        dtype=None if dtype is None else dtype.value,
    )
    left, whole = done.layers
    note(f"{done.folder} holds {left} of {whole} layers, {done.bytes / 1e9:.2f} GB.")
    if done.cosine is not None:
        mean, least = done.cosine
        note(
            f"In int8 the mean token vectors of texts keep a cosine of {mean:.4f} to float32, at least {least:.4f}."
        )
    for what, command in done.commands(to.value, model).items():
        note(f"{what}: {command}")

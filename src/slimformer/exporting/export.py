"""Make of a model and a plan what other engines load."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from slimformer.decisions.policy import TokenPolicy
from slimformer.errors import ExportError
from slimformer.exporting.card import write_card
from slimformer.exporting.checkpoint import write_checkpoint
from slimformer.exporting.gguf.architectures import why_not_gguf
from slimformer.exporting.gguf.weights import Dtype
from slimformer.exporting.gguf.write import MODEL as GGUF_MODEL
from slimformer.exporting.gguf.write import check_dtype, gguf_package, write_gguf
from slimformer.exporting.onnx import check_encoder, check_onnx, write_onnx
from slimformer.exporting.partial_layers import (
    why_not_nemotron,
    why_not_slim,
    write_nemotron,
    write_slim,
)
from slimformer.exporting.remains import Remains, what_remains
from slimformer.exporting.skeleton import read_config, skeleton
from slimformer.exporting.source import CONFIG, MODULES, Source, open_source
from slimformer.exporting.writing import SHARD_BYTES, new_folder
from slimformer.model.anatomy import transformer_of
from slimformer.plans.plan import Plan

To = Literal["checkpoint", "vllm", "gguf", "onnx"]
TARGETS: tuple[To, ...] = get_args(To)
FORMATS = {
    "checkpoint": "an ordinary checkpoint with fewer layers, for whatever loads the whole one",
    "nemotron-nas": "DeciLMForCausalLM, for vLLM (where slimformer is installed), SGLang, TensorRT-LLM and mlx-lm",
    "slimformer": "an architecture of slimformer's plugin, for vLLM where slimformer is installed: vllm serve FOLDER",
    "gguf": f"{GGUF_MODEL}, for llama.cpp and what is built on it: llama-server -m FOLDER/{GGUF_MODEL}",
    "onnx": 'an ONNX graph (onnx/model.onnx), for ONNX Runtime, OpenVINO and sentence-transformers\' backend="onnx"',
}
# What an earlier export is known by.
HOLDS = (CONFIG, MODULES, GGUF_MODEL)
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        format: In which format, the simplest that holds the plan.
        layers: How many layers are left of how many.
        bytes: How large the folder is.
        cosine: Of an encoder in int8 beside the same in float32: the cosine of mean token vectors, on average over
            some texts and at least; None for all else.
    """

    folder: Path
    format: str
    layers: tuple[int, int]
    bytes: int
    cosine: tuple[float, float] | None = None

    def describe(self) -> str:
        """The format, and what loads it."""
        return FORMATS[self.format]

    def commands(self, to: To, model: str) -> dict[str, str]:
        """How engines are started on it: what each command does, and the command.

        Args:
            to: For what it was exported.
            model: The whole model's folder or Hub id.
        """
        if to == "vllm":
            draft = {"method": "draft_model", "model": str(self.folder), "num_speculative_tokens": 4}
            whole = f"vllm serve {shlex.quote(model)} --speculative-config {shlex.quote(json.dumps(draft))}"
            return {
                "Serve it": f"vllm serve {shlex.quote(str(self.folder))}",
                "Let it draft for the whole model, whose tokens stay the same": whole,
            }
        if to == "gguf":
            file = self.folder / GGUF_MODEL
            small = self.folder / "model-Q4_K_M.gguf"
            return {
                "Serve it": shlex.join(["llama-server", "-m", str(file)]),
                "Quantise it": shlex.join(["llama-quantize", str(file), str(small), "Q4_K_M"]),
            }
        return {}


def export(
    model: Any,
    plan: Plan | str | os.PathLike[str] | Sequence[Any],
    folder: str | os.PathLike[str],
    to: To = "checkpoint",
    *,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    quantize: str | None = None,
    dtype: Dtype | None = None,
) -> Exported:
    """Write a checkpoint that computes what a patched model computes, without slimformer.

    What repair changed is merged into the weights, and weights that are not used any more are left out; tokenizer,
    generation config, chat template and licence come along, and a card is written. A checkpoint on disk is read tensor
    by tensor, so that it may be larger than memory.

    Args:
        model: A checkpoint's folder or Hub id; or a transformers model or SentenceTransformer in memory, patched or
            not, which is saved first.
        plan: A plan, where one is, or methods.
        folder: Where to; it is written whole or not at all.
        to: `"checkpoint"`: an ordinary checkpoint with fewer layers where whole blocks are dropped, for whatever loads
            the model; else `nemotron-nas` for models with Llama's layers. `"vllm"`: the same, and where neither holds
            the plan an architecture of slimformer's plugin for vLLM (Llama, Mistral, Qwen2, Qwen3 and Gemma 3, with
            means and filters of one tap too). `"gguf"`: one file for llama.cpp, of the model's own architecture where
            whole blocks are dropped, else `deci` (Llama, Mistral, Qwen2), which holds means and filters of one tap too.
            `"onnx"`: the graph of an encoder of which whole blocks are dropped.
        force: Replace an earlier export in `folder`.
        shard_bytes: The most that a file of weights holds, and about what is in memory at once.
        quantize: An ONNX graph in int8: `"int8"` for the processor of this machine, or `"avx2"`, `"avx512"`,
            `"avx512_vnni"`, `"arm64"`. Activations are rounded anew for every batch, so that no text is needed.
        dtype: Of the weights in a GGUF file: `"f32"`, `"f16"`, `"bf16"`, `"q8_0"`; left out, the checkpoint's own.
            llama.cpp's own `llama-quantize` makes the others of it.

    Raises:
        ExportError: If no format holds the plan, the checkpoint cannot be read, or `folder` cannot be written.
        PlanError: If the plan is another model's.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> import slimformer
        >>> config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=2)
        >>> folder = tempfile.mkdtemp()
        >>> drop = slimformer.LayerDrop(block=[2])
        >>> slimformer.export(LlamaForCausalLM(config), drop, f"{folder}/slim").layers
        (3, 4)
        >>> LlamaForCausalLM.from_pretrained(f"{folder}/slim").config.num_hidden_layers
        3
    """
    if to not in TARGETS:
        raise ExportError(f"export(to=...) takes one of {', '.join(TARGETS)}, got {to!r}.")
    if to == "onnx":
        check_onnx(quantize)
    elif quantize is not None:
        raise ExportError(f"export(quantize=...) goes with to='onnx', got to={to!r}. Leave it out.")
    check_dtype(dtype)
    if to == "gguf":
        gguf_package()
    elif dtype is not None:
        raise ExportError(
            f"export(dtype=...) is that of a GGUF file. With to={to!r} weights stay as they are: leave it out."
        )
    target, chosen = Path(folder), _plan(plan)
    with _on_disk(model, target) as source, new_folder(target, force, HOLDS) as temporary:
        if target.absolute().is_relative_to(source.folder.absolute()):
            raise ExportError(f"{target} lies in the checkpoint's own folder. Choose another.")
        config = read_config(source)
        dense = skeleton(config, str(source.folder))
        if to == "onnx":
            check_encoder(dense)
        remains = what_remains(chosen, dense.anatomy)
        write: Callable[..., Any]
        if to == "onnx":
            format, write = "onnx", partial(write_onnx, quantize=quantize)
        else:
            format, write = _format(to, config, remains)
        if format == "gguf":
            write = partial(write_gguf, name=target.name, dtype=dtype)
        cosine = write(temporary, source, config, dense, remains, shard_bytes)
        left = (len(remains.layers), remains.count)
        write_card(temporary, target, target.name, model, source, chosen, format, config, left, cosine)
        size = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file())
    done = Exported(target, format, left, size, cosine)
    _logger.info("%s: %s.", target, done.describe())
    return done


def _format(to: str, config: Any, remains: Remains) -> tuple[str, Callable[..., Any]]:
    """The simplest format that holds what is left, and what writes it."""
    if to == "gguf":
        why = why_not_gguf(config, remains)
        if why:
            raise ExportError(f"No GGUF file holds this plan ({remains.describe()}): {why}.")
        return "gguf", write_gguf
    if remains.whole:
        return "checkpoint", write_checkpoint
    reasons = ["an ordinary checkpoint holds whole layers"]
    ways: list[tuple[str, Callable[[Any, Remains], str], Callable[..., None]]] = [
        ("nemotron-nas", why_not_nemotron, write_nemotron)
    ]
    if to == "vllm":
        ways.append(("slimformer", why_not_slim, write_slim))
    for format, why_not, write in ways:
        why = why_not(config, remains)
        if not why:
            return format, write
        reasons.append(why)
    other = "" if to == "vllm" or why_not_slim(config, remains) else " to='vllm' holds it."
    raise ExportError(
        f"No format holds this plan ({remains.describe()}): {'; '.join(reasons)}.{other} Whole blocks dropped are held "
        "by every format."
    )


def _plan(given: Any) -> Plan:
    if isinstance(given, Plan):
        return given
    if isinstance(given, (str, os.PathLike)):
        return Plan.from_pretrained(given)
    methods = [given] if isinstance(given, TokenPolicy) else given
    if not isinstance(methods, (list, tuple)):
        raise ExportError(
            f"export(plan=...) takes a Plan, where one is, or methods, got {type(given).__name__}."
        )
    return Plan(methods)


@contextlib.contextmanager
def _on_disk(model: Any, target: Path) -> Iterator[Source]:
    """The checkpoint of a model, which is saved for so long if it is in memory."""
    if isinstance(model, (str, os.PathLike)):
        yield open_source(model if isinstance(model, str) else Path(model))
        return
    inner = transformer_of(model)
    if not hasattr(type(inner), "save_pretrained"):
        raise ExportError(
            f"export takes a checkpoint's folder or a transformers model, got {type(model).__name__}."
        )
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.absolute().parent, prefix=f".{target.name}-whole-") as whole:
        # A patched model saves its own values.
        model.save_pretrained(whole)
        yield open_source(Path(whole))

"""An encoder as an ONNX graph: made by torch's own exporter, in int8 by ONNX Runtime's own quantiser.

optimum, which sentence-transformers reads such graphs through, does not run beside this version of transformers: its
recipes for int8 are kept here by name, and what is written is what it reads.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import platform
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from slimformer.errors import ExportError
from slimformer.exporting.checkpoint import write_checkpoint
from slimformer.exporting.remains import Remains
from slimformer.exporting.skeleton import Skeleton
from slimformer.exporting.source import INDEX, Source
from slimformer.text.sources import load_texts

# Where sentence-transformers, optimum and text-embeddings-inference look for a graph.
GRAPH = Path("onnx/model.onnx")
# By the processors that they are for: the type of weights. All are dynamic, with a scale per channel and weights
# symmetric around zero; products of two unsigned bytes do not saturate in AVX2's 16 bits.
RECIPES = {"arm64": "QInt8", "avx2": "QUInt8", "avx512": "QInt8", "avx512_vnni": "QInt8"}
INT8 = "int8"
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TOKEN_VECTORS = "last_hidden_state"
# Of outputs: what training or a look inside adds.
_BESIDE = frozenset({"loss", "hidden_states", "attentions", "pooler_output", "past_key_values"})
_TOLERANCE = 1e-4
# A file of protocol buffers holds no more.
_LARGEST_FILE = 2 * 10**9
_TEXTS, _LONGEST_TEXT = 32, 128


def write_onnx(
    folder: Path,
    source: Source,
    config: Any,
    dense: Skeleton,
    remains: Remains,
    shard_bytes: int,
    quantize: str | None = None,
) -> tuple[float, float] | None:
    """Write what is left of an encoder as a graph, with all that goes with it but its weights for PyTorch.

    Args:
        folder: An empty folder.
        source: The whole checkpoint.
        config: Its config.
        dense: Its model without weights.
        remains: What is left: whole layers.
        shard_bytes: The most that a file of weights holds while the graph is made.
        quantize: The recipe of weights and activations in int8; None for float32.

    Returns:
        Of token vectors in int8, beside those in float32: the cosine of their means over a text, on average over some
        texts and at least; None for float32, another output, or a checkpoint without a tokenizer.

    Raises:
        ExportError: If parts of layers are dropped, or the graph cannot be made or computes something else.
    """
    if not remains.whole:
        raise ExportError(
            f"An ONNX graph is made of whole layers, and the plan leaves parts of them ({remains.describe()}). Drop "
            "whole blocks instead."
        )
    recipe = recipe_of(quantize)
    write_checkpoint(folder, source, config, dense, remains, shard_bytes)
    place = folder / source.model.relative_to(source.folder)
    encoder = _load(place, dense, source.pipeline)
    wanted = GRAPH if recipe is None else GRAPH.with_name("float32.onnx")
    float32, graph = place / wanted, place / GRAPH
    graph.parent.mkdir()
    _trace(encoder, float32)
    _refuse_difference(encoder, float32)
    # What ONNX Runtime reads is in the graph.
    for path in (*place.glob("*.safetensors"), place / INDEX):
        path.unlink(missing_ok=True)
    if recipe is None:
        return None
    _quantise(float32, graph, recipe)
    found = _cosines(encoder, place, float32, graph)
    for path in float32.parent.glob(f"{float32.name}*"):
        path.unlink()
    return found


def check_encoder(dense: Skeleton) -> None:
    """Refuse what is no encoder of text.

    Raises:
        ExportError: If the model generates, or reads something else.
    """
    name = type(dense.model).__name__
    if dense.anatomy.causal or getattr(dense.model.config, "is_encoder_decoder", False):
        raise ExportError(
            f"Encoders are written to ONNX, and {name} generates, with a key-value cache. Export a checkpoint "
            "(to='checkpoint') or, for llama.cpp, a GGUF file."
        )
    if dense.model.main_input_name != "input_ids":
        raise ExportError(
            f"Encoders of text are written to ONNX, and {name} reads {dense.model.main_input_name}. Export a "
            "checkpoint (to='checkpoint') instead."
        )


def check_onnx(quantize: str | None) -> None:
    """Refuse before any work is done what cannot be written here.

    Raises:
        ExportError: If a package is not installed, or the recipe is unknown.
    """
    recipe_of(quantize)
    for name in _PACKAGES:
        _package(name)


def recipe_of(quantize: str | None) -> str | None:
    """The recipe for int8 by its own name; `"int8"` is that of the processor this runs on.

    Raises:
        ExportError: If there is none of that name, or for this processor.

    Example:
        >>> recipe_of("avx2")
        'avx2'
    """
    if quantize is None or quantize in RECIPES:
        return quantize
    known = ", ".join(RECIPES)
    if quantize != INT8:
        raise ExportError(
            f"quantize takes {INT8} (for the processor of this machine), {known}, got {quantize!r}."
        )
    if platform.machine().lower() in ("arm64", "aarch64"):
        return "arm64"
    found = {"AVX2": "avx2", "AVX512": "avx512"}.get(torch.backends.cpu.get_cpu_capability())
    if found is None:
        raise ExportError(
            f"There is no recipe for the processor of this machine ({platform.machine()}, "
            f"{torch.backends.cpu.get_cpu_capability()}). Name the one that is to run the model: quantize={known}."
        )
    return found


class _Outputs(nn.Module):
    """A model as a function of its inputs in order, that gives its outputs in order."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        accepted = inspect.signature(model.forward).parameters
        types = getattr(model.config, "type_vocab_size", 0) or 0
        self.inputs = [n for n in _INPUTS if n in accepted and (n != "token_type_ids" or types > 1)]
        with torch.no_grad():
            given = model(**dict(zip(self.inputs, self.examples(2, 9), strict=True)))
        names = [name for name, value in given.items() if isinstance(value, Tensor) and name not in _BESIDE]
        self.outputs = [_TOKEN_VECTORS] if _TOKEN_VECTORS in names else names

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = self.model(**dict(zip(self.inputs, inputs, strict=True)))
        return tuple(given[name] for name in self.outputs)

    def examples(self, texts: int, tokens: int) -> tuple[Tensor, ...]:
        """Inputs `[texts, tokens]`, every text but the first padded by one token more."""
        generator = torch.Generator().manual_seed(tokens)
        ids = torch.randint(self.model.config.vocab_size, (texts, tokens), generator=generator)
        mask = (torch.arange(tokens) < tokens - torch.arange(texts)[:, None]).long()
        pad = getattr(self.model.config, "pad_token_id", None)
        ids = torch.where(mask.bool(), ids, 0 if pad is None else pad)
        return tuple(
            {"input_ids": ids, "attention_mask": mask}.get(n, torch.zeros_like(ids)) for n in self.inputs
        )


def _load(place: Path, dense: Skeleton, pipeline: bool) -> _Outputs:
    """The model of a folder in float32: with the head that the checkpoint has, without in an embedding pipeline."""
    factory: Any = type(dense.model)
    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    classifies = type(dense.model).__name__.endswith("ForSequenceClassification")
    if not pipeline or classifies:
        model, about = factory.from_pretrained(place, **options)
        if not about["missing_keys"]:
            return _Outputs(model.eval())
        if classifies:
            raise _not_whole(place, about["missing_keys"])
    model, about = AutoModel.from_pretrained(place, **options)
    # A pooler is no part of token vectors.
    missing = [name for name in about["missing_keys"] if not name.startswith("pooler.")]
    if missing:
        raise _not_whole(place, missing)
    return _Outputs(model.eval())


def _not_whole(place: Path, missing: Sequence[str]) -> ExportError:
    return ExportError(
        f"The checkpoint lacks {len(missing)} tensors that its architecture has, such as {sorted(missing)[0]}. Load "
        "and save it with transformers, which writes them all."
    )


def _trace(encoder: _Outputs, path: Path) -> None:
    examples = encoder.examples(2, 9)
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                encoder,
                examples,
                dynamo=True,
                verbose=False,
                input_names=encoder.inputs,
                output_names=encoder.outputs,
                dynamic_shapes=(tuple({0: "texts", 1: "tokens"} for _ in examples),),
            )
        # The exporter raises what it meets, of many types.
        except Exception as error:
            raise ExportError(
                f"torch could not write {type(encoder.model).__name__} as an ONNX graph: {error}. "
                "Export a checkpoint (to='checkpoint') instead."
            ) from error
        program.save(path)


def _refuse_difference(encoder: _Outputs, path: Path) -> None:
    """Compare graph and model at other sizes than those the graph was made with."""
    session = _session(path)
    for texts, tokens in ((1, 5), (3, 33)):
        inputs = encoder.examples(texts, tokens)
        with torch.no_grad():
            expected = encoder(*inputs)
        real = dict(zip(encoder.inputs, inputs, strict=True)).get("attention_mask")
        for name, right, found in zip(encoder.outputs, expected, _run(session, encoder, inputs), strict=True):
            if real is not None and right.shape[:2] == real.shape:
                right, found = right[real.bool()], found[real.bool()]
            apart = float((found - right).norm() / right.norm())
            if not apart < _TOLERANCE:
                raise ExportError(
                    f"The ONNX graph of {type(encoder.model).__name__} does not compute what the model computes: "
                    f"{name} of {texts} x {tokens} tokens is off by {apart:.1e}. Export a checkpoint instead."
                )


def _quantise(float32: Path, graph: Path, recipe: str) -> None:
    package = _package("onnxruntime.quantization")
    size = sum(path.stat().st_size for path in float32.parent.glob(f"{float32.name}*"))
    with _quiet():
        package.quantize_dynamic(
            float32,
            graph,
            per_channel=True,
            reduce_range=False,
            weight_type=package.QuantType[RECIPES[recipe]],
            # A quarter of float32 has to go into one file.
            use_external_data_format=size > 4 * _LARGEST_FILE,
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )


def _cosines(encoder: _Outputs, place: Path, float32: Path, graph: Path) -> tuple[float, float] | None:
    if encoder.outputs != [_TOKEN_VECTORS]:
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    pair = (_session(float32), _session(graph))
    texts, _ = load_texts(None, limit=_TEXTS)
    found = []
    for text in texts:
        batch = tokenizer(text, truncation=True, max_length=_LONGEST_TEXT, return_tensors="pt")
        ids = batch["input_ids"]
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
        }
        inputs = [given[name] for name in encoder.inputs]
        exact, rounded = (_run(session, encoder, inputs)[0][0].mean(0) for session in pair)
        found.append(float(torch.cosine_similarity(exact, rounded, dim=0)))
    return sum(found) / len(found), min(found)


def _session(path: Path) -> Any:
    return _package("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])


def _run(session: Any, encoder: _Outputs, inputs: Sequence[Tensor]) -> list[Tensor]:
    given = {name: tensor.numpy() for name, tensor in zip(encoder.inputs, inputs, strict=True)}
    return [torch.from_numpy(found) for found in session.run(encoder.outputs, given)]


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"ONNX is written with {', '.join(_PACKAGES)}, and {name} is not installed: "
            'pip install "slimformer[onnx]"'
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back what the exporter and the quantiser say of their own insides."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "root")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

"""Write what a plan leaves as a GGUF file, tensor by tensor."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from slimformer.errors import ExportError
from slimformer.exporting.checkpoint import remaining_entries
from slimformer.exporting.gguf.architectures import DECI, add_hyperparameters, architecture_of
from slimformer.exporting.gguf.blocks import NO_MLP, blocks_of
from slimformer.exporting.gguf.vocabulary import read_vocabulary
from slimformer.exporting.gguf.weights import DTYPES, Converted, Dtype, named, own_dtype, type_of
from slimformer.exporting.partial_layers import unused_children
from slimformer.exporting.remains import Remains
from slimformer.exporting.skeleton import Skeleton, layers_in
from slimformer.exporting.source import Source

MODEL = "model.gguf"
_COPIED = ("LICENSE", "LICENCE", "NOTICE")


def gguf_package() -> Any:
    """The package that writes such files.

    Raises:
        ExportError: If it is not installed.
    """
    try:
        # Not needed for anything else.
        import gguf  # noqa: PLC0415
    except ImportError as error:
        raise ExportError(
            "A GGUF file is written with the package gguf, which is not installed. Install it: "
            "pip install 'slimformer[gguf]'."
        ) from error
    return gguf


def write_gguf(
    folder: Path,
    source: Source,
    config: Any,
    dense: Skeleton,
    remains: Remains,
    shard_bytes: int,
    *,
    name: str,
    dtype: Dtype | None,
) -> None:
    """Write one file that llama.cpp computes as the patched model.

    Args:
        folder: An empty folder.
        source: The whole checkpoint.
        config: Its config.
        dense: Its model without weights.
        remains: What is left.
        shard_bytes: Of no use here: it is one file, written tensor by tensor.
        name: Of the model, as llama.cpp shows it.
        dtype: Of the weights; left out, the checkpoint's own.

    Raises:
        ExportError: If the tokenizer or a tensor has no place in such a file, or a number none in `dtype`.
    """
    gguf = gguf_package()
    architecture = architecture_of(config, remains)
    blocks = blocks_of(remains) if architecture is DECI else []
    vocabulary = read_vocabulary(source.model, config.vocab_size)
    entries = remaining_entries(source, dense, remains, unused_children(dense, remains))
    found = list(named(gguf, entries, layers_in(source, dense), config, dense, remains, architecture, blocks))
    dtype = dtype or own_dtype(source.config)
    kinds = {tensor.name: type_of(gguf, tensor, dtype) for tensor in found}
    writer = gguf.GGUFWriter(folder / MODEL, architecture.name)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(getattr(gguf.LlamaFileType, _file_type(dtype)))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        has = [block.attention is not None for block in blocks] or [True] * len(remains.layers)
        # The first layer tells how wide heads are.
        some = [
            attention or number == 0 or blocks[number].linear is not None
            for number, attention in enumerate(has)
        ]
        add_hyperparameters(
            writer,
            config,
            [config.num_attention_heads * there for there in some],
            [config.num_key_value_heads * there for there in has],
            [
                NO_MLP if blocks and blocks[i].mlp is None else config.intermediate_size
                for i in range(len(has))
            ],
        )
        vocabulary.add_to(gguf, writer, source.model)
        for tensor in found:
            converted = Converted(gguf, tensor, kinds[tensor.name])
            writer.add_tensor_info(tensor.name, tensor.shape, "float32", converted.nbytes, kinds[tensor.name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in found:
            writer.write_tensor_data(Converted(gguf, tensor, kinds[tensor.name]))
    finally:
        writer.close()
    for path in sorted(source.model.iterdir()):
        if path.is_file() and path.name.upper().startswith(_COPIED):
            shutil.copyfile(path, folder / path.name)


def check_dtype(dtype: Any) -> None:
    """Refuse a type that is none of those that are written.

    Raises:
        ExportError: If it is none.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ExportError(f"export(dtype=...) takes one of {', '.join(DTYPES)}, got {dtype!r}.")


def _file_type(dtype: Dtype) -> str:
    return "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"

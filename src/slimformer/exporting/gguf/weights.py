"""Weights as llama.cpp reads them: their names, their order of rows, and their types."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slimformer.errors import ExportError
from slimformer.exporting.gguf.architectures import Architecture, head_width
from slimformer.exporting.gguf.blocks import NO_MLP, Block, place_of
from slimformer.exporting.remains import Remains
from slimformer.exporting.skeleton import Skeleton
from slimformer.exporting.writing import Entry
from slimformer.model.layer_parts import KINDS

Dtype = Literal["f32", "f16", "bf16", "q8_0"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
# Older checkpoints hold what is computed from the config.
_COMPUTED = ("rotary_emb.inv_freq",)
# So many numbers are converted at a time.
_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Named:
    """A tensor under the name that llama.cpp reads.

    Attributes:
        name: The name.
        shape: Its shape, rows first.
        read: Makes it.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def named(
    gguf: Any,
    entries: list[Entry],
    lead: str,
    config: Any,
    dense: Skeleton,
    remains: Remains,
    architecture: Architecture,
    blocks: list[Block],
) -> Iterator[Named]:
    """The tensors of what is left.

    Args:
        gguf: The package.
        entries: The tensors of the checkpoint that is left, under its names.
        lead: What stands in front of a layer's number there.
        config: The whole model's.
        dense: The whole model without weights.
        remains: What is left.
        architecture: As what it is written.
        blocks: The layers of the file, where it is `deci`; empty elsewhere.

    Raises:
        ExportError: If the architecture has no place for a tensor.
    """
    parts = {kind: dense.anatomy.structure.parts(kind) for kind in KINDS}
    places = place_of(blocks)
    count = len(blocks) or len(remains.layers)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.name.upper()), count)
    for entry in entries:
        if entry.name.endswith(_COMPUTED) or (entry.name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        name, linear = entry.name, False
        if name.startswith(lead):
            number, _, inside = name[len(lead) :].partition(".")
            place = int(number)
            if blocks:
                old = remains.layers[place]
                kind = next(kind for kind in KINDS if inside.partition(".")[0] in parts[kind].children())
                place, linear = places[old, kind], (old, kind) in remains.added
            name = f"model.layers.{place}.{inside}"
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if linear:
            found = f"blk.{place}.attn_norm.weight"
        if found is None:
            raise ExportError(
                f"llama.cpp's {architecture.name} has no place for {entry.name}. Export a checkpoint "
                "(to='checkpoint'), if the plan drops whole blocks."
            )
        yield Named(found, entry.shape, partial(_changed, entry, name, config, architecture))
    yield from _computed(config)
    for index, block in enumerate(blocks):
        yield from _added(f"blk.{index}", block, config.hidden_size, first=index == 0)


def _changed(entry: Entry, name: str, config: Any, architecture: Architecture) -> Tensor:
    tensor = entry.read()
    if architecture.offset and name.endswith("norm.weight"):
        # Rounded where the model's own type would round it, the sum would differ.
        tensor = tensor.float() + architecture.offset
    for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if architecture.interleaved and f".self_attn.{part}." in name:
            # Channels i and i + half turn together in transformers, 2i and 2i + 1 there.
            halves = tensor.reshape(heads, 2, head_width(config) // 2, *tensor.shape[1:])
            tensor = halves.transpose(1, 2).reshape(tensor.shape)
    return tensor


def _computed(config: Any) -> Iterator[Named]:
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        turned = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
        width = head_width(config)
        plain = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        yield Named("rope_freqs.weight", tuple(turned.shape), lambda: plain / turned)


def _added(lead: str, block: Block, hidden: int, *, first: bool) -> Iterator[Named]:
    """What a block has that no layer of the model has."""
    if block.matrix is not None:
        yield Named(f"{lead}.attn_output.weight", (hidden, hidden), block.matrix.detach)
    elif first and block.attention is None:
        # The first layer tells how wide heads are, so it has some: a linear layer of zeros.
        yield Named(f"{lead}.attn_norm.weight", (hidden,), lambda: torch.ones(hidden))
        yield Named(f"{lead}.attn_output.weight", (hidden, hidden), lambda: torch.zeros(hidden, hidden))
    if block.mlp is None:
        yield Named(f"{lead}.ffn_norm.weight", (hidden,), lambda: torch.ones(hidden))
        for name, shape in (
            ("gate", (NO_MLP, hidden)),
            ("up", (NO_MLP, hidden)),
            ("down", (hidden, NO_MLP)),
        ):
            yield Named(f"{lead}.ffn_{name}.weight", shape, partial(torch.zeros, *shape))
        if block.bias is not None:
            yield Named(f"{lead}.ffn_down.bias", (hidden,), block.bias.detach)


def own_dtype(raw: dict[str, Any]) -> Dtype:
    """The type of a checkpoint's weights, by its config."""
    own: dict[str, Dtype] = {"bfloat16": "bf16", "float16": "f16"}
    return own.get(str(raw.get("dtype") or raw.get("torch_dtype")), "f32")


def type_of(gguf: Any, tensor: Named, dtype: Dtype) -> Any:
    """In which type a tensor is written: vectors, and rows that no block of eight bits fits, stay more exact."""
    if len(tensor.shape) < 2:
        return gguf.GGMLQuantizationType.F32
    if dtype == "q8_0" and tensor.shape[-1] % 32:
        return gguf.GGMLQuantizationType.F16
    return gguf.GGMLQuantizationType[dtype.upper()]


class Converted:
    """A tensor that is converted while it is written, for what a writer asks of an array.

    Attributes:
        nbytes: How many bytes it takes.
    """

    def __init__(self, gguf: Any, tensor: Named, kind: Any) -> None:
        self._gguf, self._tensor, self._kind = gguf, tensor, kind
        self.nbytes = math.prod(gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind))

    def tofile(self, file: Any) -> None:
        """Write it.

        Raises:
            ExportError: If a number is too large for the type.
        """
        tensor = self._tensor.read()
        rows = max(1, _AT_ONCE // max(1, tensor.shape[-1])) if tensor.dim() > 1 else tensor.shape[0]
        for part in tensor.split(rows):
            numbers = part.float().contiguous()
            if self._kind.name == "F16" and float(numbers.abs().max()) > torch.finfo(torch.float16).max:
                raise ExportError(f"{self._tensor.name} has numbers too large for f16. Write bf16 or f32.")
            self._gguf.quants.quantize(numbers.numpy(), self._kind).tofile(file)

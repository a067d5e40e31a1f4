"""What is left of a model as layers of llama.cpp's `deci`: an attention, a linear layer or nothing, and then an MLP."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from slimformer.exporting.remains import Remains
from slimformer.model.layer_parts import KINDS, Kind

# An MLP of zeros this wide stands where there is none, since `deci` skips a layer without MLP as a whole. It is the
# least that all types of weights have room for.
NO_MLP = 32


@dataclass
class Block:
    """One layer there.

    Attributes:
        attention: The layer whose attention it has.
        linear: The sublayer in whose place it has a linear layer `[hidden, hidden]`, instead.
        matrix: That layer's.
        mlp: The layer whose MLP it has.
        bias: What is added at the end in place of an MLP `[hidden]`.
    """

    attention: int | None = None
    linear: tuple[int, Kind] | None = None
    matrix: Tensor | None = None
    mlp: int | None = None
    bias: Tensor | None = None


def blocks_of(remains: Remains) -> list[Block]:
    """The layers that compute what is left, in order: an attention and the next MLP share one where they meet."""
    blocks: list[Block] = []
    # Whether something may still come behind the last block's attention.
    unfinished = False
    for layer in remains.layers:
        for kind in KINDS:
            if remains.gone(layer, kind):
                continue
            if (layer, kind) in remains.added:
                bias, matrix = remains.added[layer, kind]
                if matrix is not None:
                    blocks.append(Block(linear=(layer, kind), matrix=matrix, bias=bias))
                elif unfinished:
                    blocks[-1].bias = bias
                else:
                    blocks.append(Block(bias=bias))
                unfinished = False
            elif kind == "attention":
                blocks.append(Block(attention=layer))
                unfinished = True
            else:
                if not unfinished:
                    blocks.append(Block())
                blocks[-1].mlp = layer
                unfinished = False
    return blocks


def place_of(blocks: list[Block]) -> dict[tuple[int, Kind], int]:
    """The block of every sublayer that has tensors of its own."""
    places: dict[tuple[int, Kind], int] = {}
    for number, block in enumerate(blocks):
        if block.attention is not None:
            places[block.attention, "attention"] = number
        if block.linear is not None:
            places[block.linear] = number
        if block.mlp is not None:
            places[block.mlp, "mlp"] = number
    return places

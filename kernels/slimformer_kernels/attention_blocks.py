"""How large a piece of attention one program computes, by dtype, head width and GPU."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Above this head width the tiles of queries, keys and values no longer fit into shared memory side by side.
WIDEST_HEAD = 256


class Blocks(NamedTuple):
    """The piece of work of one program: ``queries`` against ``keys`` at a time, by ``warps`` warps."""

    queries: int
    keys: int
    warps: int
    stages: int


# By bytes of an element and padded head width. Two warp groups of Hopper share the queries at a width of 128;
# float32 multiplies out of registers, and larger blocks would spill.
_BLOCKS = {
    (2, 64): Blocks(128, 64, 8, 3),
    (2, 128): Blocks(128, 64, 8, 3),
    (2, 256): Blocks(64, 32, 4, 3),
    (4, 64): Blocks(32, 32, 4, 2),
    (4, 128): Blocks(32, 16, 4, 2),
    (4, 256): Blocks(32, 16, 8, 2),
}


def block_width(width: int) -> int:
    """The columns of a tile that holds heads of a width."""
    return max(16, 1 << (width - 1).bit_length())


def blocks_for(query: Tensor, longest: int) -> Blocks:
    """The blocks for a dtype and head width; fewer queries for decoding, fewer stages for a smaller GPU."""
    width, size = block_width(int(query.shape[2])), query.element_size()
    blocks = _BLOCKS[size, max(width, 64)]
    if longest <= 16:
        blocks = blocks._replace(queries=16, warps=4)
    elif longest <= 64 < blocks.queries:
        blocks = blocks._replace(queries=64, warps=4)
    if query.is_cuda:
        room = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
        while blocks.stages > 1 and width * size * (blocks.queries + 2 * blocks.keys * blocks.stages) > room:
            blocks = blocks._replace(stages=blocks.stages - 1)
    return blocks

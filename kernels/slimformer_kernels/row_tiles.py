"""How rows are cut into programs, for every kernel that works row by row.

Each kernel loads its row indices itself. A shared device function would cost copies: PyTorch takes every
pointer given to a function whose result reaches an address of a store for written, and clones that tensor.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# A norm keeps its whole row in registers: above this width 16 warps would spill.
WIDEST_NORM_ROW = 32768
# 2048 elements are 16 per thread at 4 warps: two 16-byte accesses in bfloat16.
_TILE_ELEMENTS = 2048
_ELEMENTS_PER_WARP = 512


class RowTile(NamedTuple):
    """The piece of work of one program: ``rows`` x ``columns`` elements by ``warps`` warps."""

    rows: int
    columns: int
    warps: int


def row_tile(width: int, *, widest: int) -> RowTile:
    """Choose the tile for rows of ``width`` elements; at most ``widest`` columns go into one program.

    Example:
        >>> row_tile(4096, widest=32768)
        RowTile(rows=1, columns=4096, warps=8)
        >>> row_tile(576, widest=32768)
        RowTile(rows=2, columns=1024, warps=4)
    """
    columns = min(1 << (width - 1).bit_length(), widest)
    rows = min(max(_TILE_ELEMENTS // columns, 1), 32)
    warps = min(max(rows * columns // _ELEMENTS_PER_WARP, 1), 16)
    return RowTile(rows, columns, warps)


def row_programs(count: int, tile: RowTile) -> int:
    """Number of programs over ``count`` rows, one to spare: an empty launch needs no branch on ``count``.

    A compiled graph may not know the count (rows from ``nonzero``), and a grid of zero programs is illegal.
    """
    return count // tile.rows + 1


def row_count(x: Tensor, rows: Tensor | None) -> int:
    """Number of rows that a call works on."""
    return x.shape[0] if rows is None else rows.shape[0]

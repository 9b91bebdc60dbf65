"""Task vectors block by block, for formulas in PyTorch: memory for a block, whatever the tile."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ._method import BLOCK, Tile

if TYPE_CHECKING:
    from torch import Tensor


def blocks(tile: Tile) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The same blocks whatever the tile: its place in the tile, the base (P,) and task vectors
    (N, P), in the type of sums."""
    from .._checks import accumulation_dtype

    for at in range(0, tile.rows.shape[1], BLOCK):
        place = slice(at, at + BLOCK)
        wide = tile.rows[:, place].to(accumulation_dtype(tile.rows.dtype))
        yield place, wide[-1], wide[:-1] - wide[-1]

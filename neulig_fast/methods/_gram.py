"""Inner products of a tensor's rows, all that the methods on spheres know of it.

Vectors are then coefficients over the rows, whatever their length: the sum of a_i x_i has the
squared norm a' G a. A whole iteration on a sphere costs as much as its arithmetic on N numbers, and
the tensor is read twice in all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ._method import BLOCK, Measure, Statistic, Tile

if TYPE_CHECKING:
    from torch import Tensor


def gram(base: bool) -> Measure:
    """G (N, N) in fp64 of experts, or of their differences to the base: formed before multiplied.

    Products are summed in fp32 (fp64 for fp64) within blocks, and in fp64 over blocks.
    """
    total = yield Statistic(lambda tile: _of_tile(tile, base))
    return total


def _of_tile(tile: Tile, base: bool) -> Iterator[Tensor]:
    from .._checks import accumulation_dtype

    wide = accumulation_dtype(tile.rows.dtype)
    for block in tile.rows.split(BLOCK, dim=1):
        x = block.to(wide)
        if base:
            x = x[:-1] - x[-1]
        yield (x @ x.T).double().cpu()

"""Inner products of a tensor's rows, all that the methods on spheres know of it.

Vectors are then coefficients over the rows, whatever their length: the sum of a_i x_i has the
squared norm a' G a. A whole iteration on a sphere costs as much as its arithmetic on N numbers, and
the tensor is read twice in all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._method import Measure, Statistic, Tile, bounds

if TYPE_CHECKING:
    from torch import Tensor


def gram(base: bool) -> Measure:
    """G (N, N) in fp64 of experts, or of their differences to the base: formed before multiplied.

    Products are summed as :func:`neulig_fast.gram` does within blocks, and in fp64 over blocks.
    """
    total = yield Statistic(lambda tile: _of_tile(tile, base))
    return total


def _of_tile(tile: Tile, base: bool) -> Tensor:
    """(blocks, N, N)."""
    from ..ops import gram as products

    rows, row = (tile.rows[:-1], tile.rows[-1]) if base else (tile.rows, None)
    return products(rows, row, bounds(tile)).cpu()

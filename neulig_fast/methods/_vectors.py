"""A tensor's rows or columns as vectors, each with coefficients of its own.

A row is along the last dimension, a column along the first; a tensor of one dimension is one of
either. What :mod:`.spherical` does with whole tensors it does here with each of them: inner
products of the experts' vectors, in fp64, and from those what each expert is multiplied by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, TypeAlias

from ._bands import bands, cut_bands
from ._method import BLOCK, Apply, Measure, Statistic, Task, Tile

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

# From inner products (..., N, N) to what vectors are multiplied by, (..., N).
Coefficients: TypeAlias = "Callable[[np.ndarray], np.ndarray]"

MOST_COLUMNS = 1 << 16  # their products are kept in memory, beside the buffers


def measure_rows(task: Task) -> Measure:
    """The rows that tiles cut."""
    return (yield from cut_bands(task))


def measure_columns(task: Task) -> Measure:
    """(M, N, N): inner products of every column."""
    return (yield Statistic(lambda tile: _of_columns(task, tile)))


def columns(task: Task) -> int:
    """How many there are."""
    return prod(task.shape[1:])


def rows_on_sphere(task: Task, cut: Mapping[int, Tensor], coefficients: Coefficients) -> Apply:
    """Every row with coefficients of its own."""

    def apply(tile: Tile, out: Tensor) -> None:
        import torch

        for band in bands(task, tile, cut):
            base, d = _vectors(task, band.rows)
            wide = d.double().transpose(0, 1)
            found = coefficients(torch.matmul(wide, wide.transpose(1, 2)).cpu().numpy())
            each = torch.from_numpy(found.T.copy()).to(d)[:, :, None]
            merged = base + (each * d).sum(0)
            out[band.of_tile] = merged.flatten()[band.of_band].to(out.dtype)

    return apply


def columns_on_sphere(task: Task, products: Tensor, coefficients: Coefficients) -> Apply:
    """Every column with coefficients of its own."""
    found = coefficients(products.numpy()).T.copy()

    def apply(tile: Tile, out: Tensor) -> None:
        import torch

        each = torch.from_numpy(found).to(tile.rows.device)
        for start, place, rows in _blocks(tile):
            base, d = _vectors(task, rows)
            column = torch.arange(start, start + d.shape[1], device=d.device) % each.shape[1]
            out[place] = (base + (each[:, column].to(d.dtype) * d).sum(0)).to(out.dtype)

    return apply


def _of_columns(task: Task, tile: Tile) -> Iterator[Tensor]:
    """(M, N, N) for each block."""
    import torch

    count = columns(task)
    for start, _, rows in _blocks(tile):
        _, d = _vectors(task, rows)
        before = start % count
        whole = torch.nn.functional.pad(d.double(), (before, -(before + d.shape[1]) % count))
        wide = whole.view(len(d), -1, count)
        yield (wide[:, None] * wide).sum(2).permute(2, 0, 1).cpu()


def _blocks(tile: Tile) -> Iterator[tuple[int, slice, Tensor]]:
    """Block by block: its place in the tensor and in the tile, and its rows."""
    for at in range(0, tile.rows.shape[1], BLOCK):
        place = slice(at, at + BLOCK)
        yield tile.start + at, place, tile.rows[:, place]


def _vectors(task: Task, rows: Tensor) -> tuple[Tensor | float, Tensor]:
    """The base and task vectors, in the type of sums; without a base 0 and the models."""
    from .._checks import accumulation_dtype

    wide = rows.to(accumulation_dtype(rows.dtype))
    return (wide[-1], wide[:-1] - wide[-1]) if task.base else (0.0, wide)

"""Whole rows of a tensor, for methods that know an element by the row it stands in.

A row is along the last dimension. Rows are looked at in *bands*: as many as make up a block, and
one at least. They are the same bands whatever the tiles, so that nothing computed of one depends on
tiles. A tile cuts bands at its ends; those are read before and kept. A merge has
tiles of whole bands, so that there are none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from ._method import BLOCK, Measure, Statistic, Task, Tile

if TYPE_CHECKING:
    from torch import Tensor


class Band(NamedTuple):
    """Some rows, and what a tile has of them.

    Attributes:
        start: its first element's place in the tensor.
        rows: (N, R, W), of each model R rows of W elements, whether the tile has them all or not.
        of_tile: where the tile's part lies in the tile.
        of_band: and where in the R * W elements; a band belongs to the tile where this starts at 0.
    """

    start: int
    rows: Tensor
    of_tile: slice
    of_band: slice


class _Span(NamedTuple):
    """Elements [first, last) of the band [start, stop) lie in a tile."""

    start: int
    stop: int
    first: int
    last: int

    @property
    def cut(self) -> bool:
        return (self.start, self.stop) != (self.first, self.last)


def of_band(task: Task) -> int:
    """The piece of methods that compute band by band."""
    width = max(_width(task), 1)
    return width * max(1, BLOCK // width)


def cut_bands(task: Task) -> Measure:
    """The bands that tiles cut, by their start: (N, R * W) each, on the CPU."""
    parts = yield Statistic(lambda tile: _cut_parts(task, tile), over="tiles")
    found: dict[int, Tensor] = {}
    for span, part in (pair for of_tile in parts for pair in of_tile):
        if span.start not in found:
            found[span.start] = part.new_zeros(len(part), span.stop - span.start)
        found[span.start][:, span.first - span.start : span.last - span.start] = part
    return found


def bands(task: Task, tile: Tile, cut: Mapping[int, Tensor]) -> Iterator[Band]:
    """All bands that a tile has elements of, in order; ``cut`` as :func:`cut_bands` found them."""
    for span in _spans(task, tile):
        of_tile = slice(span.first - tile.start, span.last - tile.start)
        rows = cut[span.start].to(tile.rows.device) if span.cut else tile.rows[:, of_tile]
        of_band = slice(span.first - span.start, span.last - span.start)
        yield Band(span.start, rows.reshape(len(rows), -1, _width(task)), of_tile, of_band)


def _width(task: Task) -> int:
    return task.shape[-1] if task.shape else 1


def _spans(task: Task, tile: Tile) -> Iterator[_Span]:
    step = of_band(task)
    end = tile.start + tile.rows.shape[1]
    for start in range(tile.start // step * step, end, step):
        stop = min(start + step, task.elements)
        yield _Span(start, stop, max(start, tile.start), min(stop, end))


def _cut_parts(task: Task, tile: Tile) -> list[tuple[_Span, Tensor]]:
    return [
        # A copy: the next tile comes into the same memory.
        (span, tile.rows[:, span.first - tile.start : span.last - tile.start].to("cpu", copy=True))
        for span in _spans(task, tile)
        if span.cut
    ]

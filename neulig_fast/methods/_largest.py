"""Thresholds of the largest of some numbers, whether they fit into memory as a whole or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ._method import BLOCK, Measure, Statistic, Task, Tile
from ._selection import TiledSelect

if TYPE_CHECKING:
    from torch import Tensor

# Of a tile, piece by piece in order: rows (N, P) whose largest magnitudes are wanted, and what is
# subtracted from each. What is computed for the purpose comes in small pieces, since it takes
# memory beside the tile.
Numbers: TypeAlias = "Callable[[Tile], Iterable[tuple[Tensor, Tensor | None]]]"


def largest(task: Task, counts: Sequence[int]) -> Measure:
    """(thresholds, cuts), a list each: what magnitude_select says of a tensor's task vectors."""
    found = yield Statistic(lambda tile: _select(tile, counts), over="whole")
    if found is None:
        found = yield from largest_of(task, counts, lambda tile: [(tile.rows[:-1], tile.rows[-1])])
    return found


def largest_of(task: Task, counts: Sequence[int], of: Numbers) -> Measure:
    """The same of numbers that are in no memory: digit by digit, and then the cuts, in the tiles
    that have the last ties."""
    search = yield from _searched(task, counts, of)
    numbers = itertools.count()
    found = yield Statistic(lambda tile: _cuts(tile, of, next(numbers), search), over="tiles")
    return search.thresholds(), [max(cuts) for cuts in zip(*found, strict=True)]


def thresholds_of(task: Task, counts: Sequence[int], of: Numbers) -> Measure:
    """The thresholds alone."""
    search = yield from _searched(task, counts, of)
    return search.thresholds()


def _select(tile: Tile, counts: Sequence[int]) -> tuple[list[float], list[int]]:
    import torch

    from ..ops import magnitude_select

    wanted = torch.tensor(list(counts), device=tile.rows.device)
    thresholds, cuts = magnitude_select(tile.rows[:-1], wanted, tile.rows[-1])
    return thresholds.tolist(), cuts.tolist()


def _searched(task: Task, counts: Sequence[int], of: Numbers) -> Measure:
    search = TiledSelect(counts, bits=64 if task.dtype == "F64" else 32)
    while not search.done:
        search.advance((yield Statistic(_histogram(search, of), over="tiles")))
    return search


def _histogram(search: TiledSelect, of: Numbers) -> Callable[[Tile], list[list[int]]]:
    prefixes, digit = list(search.prefixes), search.digit

    def counted(tile: Tile) -> list[list[int]]:
        import torch

        from ..ops import magnitude_histogram

        wanted = torch.tensor(prefixes, device=tile.rows.device)
        total = torch.zeros(1, dtype=torch.int64, device=tile.rows.device)
        for rows, base in of(tile):
            total = total + magnitude_histogram(rows, wanted, digit, base)
        return total.tolist()

    return counted


def _cuts(tile: Tile, of: Numbers, number: int, search: TiledSelect) -> list[int]:
    """For every row whose last tie is in this tile its cut, else 0."""
    ends = zip(search.last_tiles(), search.thresholds(), strict=True)
    return [
        _cut(tile, of, i, threshold, end.tie) if end is not None and end.tile == number else 0
        for i, (end, threshold) in enumerate(ends)
    ]


def _cut(tile: Tile, of: Numbers, i: int, threshold: float, tie: int) -> int:
    """One past the ``tie``-th number of row i, from 1, whose magnitude is the threshold."""
    from .._checks import accumulation_dtype

    place, found = tile.start, 0
    for rows, base in of(tile):
        for at in range(0, rows.shape[1], BLOCK):
            row = rows[i, at : at + BLOCK].to(accumulation_dtype(rows.dtype))
            d = row if base is None else row - base[at : at + BLOCK].to(row.dtype)
            ties = (d.abs() == threshold).nonzero()
            if 0 < tie <= len(ties):
                found = place + int(ties[tie - 1]) + 1
            tie -= len(ties)
            place += len(row)
    return found

"""Thresholds of the largest of some numbers, whether they fit into memory as a whole or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ._method import Measure, Statistic, Task, Tile
from ._selection import LastTile, TiledSelect

if TYPE_CHECKING:
    from torch import Tensor

# Of a tile: rows whose largest magnitudes are wanted, and what is subtracted from each.
Numbers: TypeAlias = "Callable[[Tile], tuple[Tensor, Tensor | None]]"


def task_vectors(tile: Tile) -> tuple[Tensor, Tensor | None]:
    """Those of a tile's experts."""
    return tile.rows[:-1], tile.rows[-1]


def largest(task: Task, counts: Sequence[int], of: Numbers = task_vectors) -> Measure:
    """(thresholds, cuts), a list each: what magnitude_select says of a whole tensor."""
    found = yield Statistic(lambda tile: _select(of(tile), counts), over="whole")
    if found is None:
        found = yield from _in_tiles(task, counts, of)
    return found


def _select(
    numbers: tuple[Tensor, Tensor | None], counts: Sequence[int]
) -> tuple[list[float], list[int]]:
    import torch

    from ..ops import magnitude_select

    rows, base = numbers
    thresholds, cuts = magnitude_select(rows, torch.tensor(list(counts), device=rows.device), base)
    return thresholds.tolist(), cuts.tolist()


def _in_tiles(task: Task, counts: Sequence[int], of: Numbers) -> Measure:
    """Digit by digit, and then the cuts, in the tiles that have the last ties."""
    search = TiledSelect(counts, bits=64 if task.dtype == "F64" else 32)
    while not search.done:
        search.advance((yield Statistic(_histogram(search, of), over="tiles")))
    ends = search.last_tiles()
    numbers = itertools.count()
    found = yield Statistic(lambda tile: _cuts(tile, of, next(numbers), ends), over="tiles")
    return search.thresholds(), [max(cuts) for cuts in zip(*found, strict=True)]


def _histogram(search: TiledSelect, of: Numbers) -> Callable[[Tile], list[list[int]]]:
    prefixes, digit = list(search.prefixes), search.digit

    def counted(tile: Tile) -> list[list[int]]:
        import torch

        from ..ops import magnitude_histogram

        rows, base = of(tile)
        wanted = torch.tensor(prefixes, device=rows.device)
        return magnitude_histogram(rows, wanted, digit, base).tolist()

    return counted


def _cuts(tile: Tile, of: Numbers, number: int, ends: Sequence[LastTile | None]) -> list[int]:
    """For every row whose last tie is in this tile its cut, else 0."""
    counts = [end.wanted if end is not None and end.tile == number else 0 for end in ends]
    if not any(counts):
        return counts
    found = zip(*_select(of(tile), counts), counts, strict=True)
    length = tile.rows.shape[1]  # all of a tile's elements: no threshold, and the cut is its end
    return [
        tile.start + (length if threshold < 0 else cut) if count else 0
        for threshold, cut, count in found
    ]

"""Thresholds of a task's largest magnitudes, whether its tensor fits into memory or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from ._method import Measure, Statistic, Task, Tile
from ._selection import LastTile, TiledSelect


def largest(task: Task, counts: Sequence[int]) -> Measure:
    """(thresholds, cuts), a list each, of magnitude_select of a task's task vectors."""
    found = yield Statistic(lambda tile: _select(tile, counts), over="whole")
    if found is None:
        found = yield from _in_tiles(task, counts)
    return found


def _select(tile: Tile, counts: Sequence[int]) -> tuple[list[float], list[int]]:
    import torch

    from ..ops import magnitude_select

    rows = tile.rows
    wanted = torch.tensor(list(counts), device=rows.device)
    thresholds, cuts = magnitude_select(rows[:-1], wanted, rows[-1])
    return thresholds.tolist(), cuts.tolist()


def _in_tiles(task: Task, counts: Sequence[int]) -> Measure:
    """Digit by digit, and then the cuts, in the tiles that have the last ties."""
    search = TiledSelect(counts, bits=64 if task.dtype == "F64" else 32)
    while not search.done:
        prefixes, digit = search.prefixes, search.digit
        search.advance((yield Statistic(_histogram(prefixes, digit), over="tiles")))
    ends = search.last_tiles()
    numbers = itertools.count()
    found = yield Statistic(lambda tile: _cuts(tile, next(numbers), ends), over="tiles")
    return search.thresholds(), [max(cuts) for cuts in zip(*found, strict=True)]


def _cuts(tile: Tile, number: int, ends: Sequence[LastTile | None]) -> list[int]:
    """For every expert whose last tie is in this tile its cut, else 0."""
    counts = [end.count if end is not None and end.tile == number else 0 for end in ends]
    if not any(counts):
        return counts
    length = tile.rows.shape[1]
    thresholds, cuts = _select(tile, counts)
    ends_here = [length if threshold < 0 else cut for threshold, cut in zip(thresholds, cuts, strict=True)]
    return [
        tile.start + cut if count else 0 for cut, count in zip(ends_here, counts, strict=True)
    ]


def _histogram(prefixes: Sequence[int], digit: int) -> Callable[[Tile], list[list[int]]]:
    def of(tile: Tile) -> list[list[int]]:
        import torch

        from ..ops import magnitude_histogram

        rows = tile.rows
        wanted = torch.tensor(list(prefixes), device=rows.device)
        return magnitude_histogram(rows[:-1], wanted, digit, rows[-1]).tolist()

    return of

"""The largest magnitudes of a tensor, or of a model, as methods want to know them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from ._method import BLOCK, Measure, Statistic, Task, Tile
from ._selection import Count, TiledSelect

if TYPE_CHECKING:
    from torch import Tensor

# Of a tile, piece by piece in order: rows (N, P) whose largest magnitudes are wanted, and what is
# subtracted from each. What is computed for the purpose comes in small pieces, since it takes
# memory beside the tile.
Pieces: TypeAlias = "Iterable[tuple[Tensor, Tensor | None]]"
Numbers: TypeAlias = "Callable[[Tile], Pieces]"
Number = TypeVar("Number", int, float)


def task_vectors(tile: Tile) -> Pieces:
    """Those of a tile's experts."""
    return [(tile.rows[:-1], tile.rows[-1])]


def largest(task: Task, counts: Sequence[int]) -> Measure:
    """(thresholds, cuts), a list each: what magnitude_select says of a tensor's task vectors. Where
    all elements that equal a threshold are wanted, a cut may be any place after them."""
    (found,) = yield from several(task, [counts])
    return found


def several(task: Task, counts: Sequence[Sequence[int]]) -> Measure:
    """:func:`largest` for several lists of counts, in the same passes."""
    wanted = tuple(map(tuple, counts))
    found = yield Statistic(_Selected(wanted), over="whole")
    if found is None:
        found = yield from _in_tiles(task, wanted, task_vectors)
    return found


def largest_of(task: Task, counts: Sequence[int], of: Numbers) -> Measure:
    """:func:`largest` of numbers that are in no memory: digit by digit, and then the cuts, in the
    tiles that have the last ties."""
    (found,) = yield from _in_tiles(task, (tuple(counts),), of)
    return found


@dataclass(frozen=True)
class _Selected:
    """Of a tile that is the whole tensor: thresholds and cuts for every list of counts."""

    counts: tuple[tuple[int, ...], ...]

    def __call__(self, tile: Tile) -> list[tuple[list[float], list[int]]]:
        import torch

        from ..ops import magnitude_select

        rows, base = tile.rows[:-1], tile.rows[-1]
        found = (
            magnitude_select(rows, torch.tensor(each, device=rows.device), base)
            for each in self.counts
        )
        return [(thresholds.tolist(), cuts.tolist()) for thresholds, cuts in found]


def _in_tiles(task: Task, counts: tuple[tuple[int, ...], ...], of: Numbers) -> Measure:
    search, placed = yield from _searched(task, counts, of)
    cuts = yield from _cuts(task, search, placed, len(counts), of)
    parts = (_split(values, len(counts)) for values in (search.thresholds(), cuts))
    return list(zip(*parts, strict=True))


def magnitudes_of_rank(task: Task, ranks: Sequence[Sequence[Count]], of: Numbers) -> Measure:
    """Of the numbers of each row that are not NaN the magnitudes with these ranks, 1 the largest;
    one beyond the last is the smallest. A list for every list of ranks."""
    search, _ = yield from _searched(task, tuple(map(tuple, ranks)), of)
    found = search.thresholds()
    if any(value < 0 for value in found):
        least = yield Statistic(_Least(of), over="tiles")
        smallest = [min(values) for values in zip(*least, strict=True)]
        found = [v if v >= 0 else smallest[i % len(smallest)] for i, v in enumerate(found)]
    return _split(found, len(ranks))


def _searched(task: Task, counts: tuple[tuple[Count, ...], ...], of: Numbers) -> Measure:
    """Digit by digit: the search, and of every tile its start and the counts of the last digit."""
    search = TiledSelect(sum(counts, ()), bits=64 if task.dtype == "F64" else 32)
    placed: list[tuple[int, Tensor]] = []
    while not search.done:
        count = _Histogram(of, search.digit, _split(search.prefixes, len(counts)))
        if search.last:
            placed = yield Statistic(_Placed(count), over="tiles")
            first, *others = (found for _, found in placed)
            search.advance(sum(others, first).tolist())
        else:
            search.advance((yield Statistic(count)).tolist())
    return search, placed


def _split(values: Sequence[Number], parts: int) -> tuple[tuple[Number, ...], ...]:
    length = len(values) // parts
    return tuple(tuple(values[k * length : (k + 1) * length]) for k in range(parts))


@dataclass(frozen=True)
class _Histogram:
    """(1, lists * N, 2048): how often every value of a digit occurs in a tile."""

    of: Numbers
    digit: int
    prefixes: tuple[tuple[int, ...], ...]

    def __call__(self, tile: Tile) -> Tensor:
        import torch

        from ..ops import magnitude_histogram

        known: dict[tuple[int, ...], Tensor] = {}
        for rows, base in self.of(tile):
            for each in dict.fromkeys(self.prefixes):
                wanted = torch.tensor(each, device=rows.device)
                counts = magnitude_histogram(rows, wanted, self.digit, base)
                known[each] = known[each] + counts if each in known else counts
        return torch.cat([known[each] for each in self.prefixes])[None].cpu()


@dataclass(frozen=True)
class _Least:
    """The smallest magnitude of every row that is not NaN; infinity where all are."""

    of: Numbers

    def __call__(self, tile: Tile) -> list[float]:
        import torch

        from ..ops._magnitudes import magnitudes

        found = [
            torch.stack([magnitudes(row, base).nan_to_num(nan=torch.inf).min() for row in rows])
            for rows, base in _in_blocks(self.of(tile))
        ]
        return torch.stack(found).amin(0).tolist()


def _in_blocks(pieces: Pieces) -> Pieces:
    """None larger than a block: formulas in PyTorch take memory beside it."""
    for rows, base in pieces:
        for at in range(0, rows.shape[1], BLOCK):
            part = slice(at, at + BLOCK)
            yield rows[:, part], None if base is None else base[part]


@dataclass(frozen=True)
class _Placed:
    """A tile's start, and its histogram of the lowest digit without the half that is zero."""

    histogram: _Histogram

    def __call__(self, tile: Tile) -> tuple[int, Tensor]:
        from ..ops._digits import DIGITS

        return tile.start, self.histogram(tile)[0, :, : 1 << DIGITS[32][-1].width].clone()


def _cuts(
    task: Task, search: TiledSelect, placed: Sequence[tuple[int, Tensor]], lists: int, of: Numbers
) -> Measure:
    """For each expert, for each list: one past the last tie."""
    cuts = [task.elements if every else 0 for every in search.all_ties()]
    starts, ends = [start for start, _ in placed], search.last_ties([found for _, found in placed])
    sought = {i: end for i, end in enumerate(ends) if end is not None and not cuts[i]}
    if sought:
        experts, thresholds = len(cuts) // lists, search.thresholds()
        ties = tuple(
            (starts[end.tile], i % experts, thresholds[i], end.rank) for i, end in sought.items()
        )
        among = frozenset(start for start, *_ in ties)
        found = yield Statistic(_Place(of, ties), over="tiles", starts=among)
        for places in found:
            for i, place in zip(sought, places, strict=True):
                cuts[i] += place
    return cuts


@dataclass(frozen=True)
class _Place:
    """Of ties (start of a tile, row, threshold, rank): one past each in a tile, else 0."""

    of: Numbers
    ties: tuple[tuple[int, int, float, int], ...]

    def __call__(self, tile: Tile) -> list[int]:
        return [
            self._after(tile, row, threshold, rank) if start == tile.start else 0
            for start, row, threshold, rank in self.ties
        ]

    def _after(self, tile: Tile, i: int, threshold: float, rank: int) -> int:
        """One past the rank-th element of row i whose magnitude is the threshold."""
        from ..ops._magnitudes import magnitudes

        place = tile.start
        for rows, base in _in_blocks(self.of(tile)):
            row = magnitudes(rows[i], base)
            found = (row == threshold).nonzero()
            if rank <= len(found):
                return place + int(found[rank - 1]) + 1
            rank, place = rank - len(found), place + len(row)
        raise RuntimeError("elements that were counted are not there: a model changed meanwhile")

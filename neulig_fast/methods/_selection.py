"""magnitude_select of task vectors that are seen tile by tile: the arithmetic between the passes.

For every digit, the sum of magnitude_histogram over all tiles, then :meth:`TiledSelect.advance`.
Two or more machines do the same with the counts of all tiles. Thresholds follow from the last
digit, and so do the tiles in which the last ties lie that count.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from ..ops._digits import DIGITS

# How many are wanted; or what says it of how many there are that are not NaN.
Count: TypeAlias = "int | Callable[[int], int]"


class LastTie(NamedTuple):
    """Of the elements of a tile whose magnitude is the threshold, the ``rank``-th (from 1) is the
    last that counts."""

    tile: int
    rank: int


class TiledSelect:
    """The search for the counts[i]-th largest magnitude of N experts.

    Args:
        counts: how many elements of each expert are wanted.
        bits: of the type of differences: 32, or 64 for fp64 parameters.

    ``digit`` is the one to count next and ``prefixes`` the bits above it, one for each expert; -1
    where all elements or none are wanted, so that nothing is left to count.
    """

    def __init__(self, counts: Sequence[Count], bits: int = 32) -> None:
        self.bits = bits
        self.digit = 0
        self._counts = counts
        self.prefixes = [0 if callable(count) or count > 0 else -1 for count in counts]
        self._all = [False] * len(counts)
        self._ranks = [0] * len(counts)  # among the magnitudes with the prefix
        self._ties = [0] * len(counts)  # how many have it

    @property
    def done(self) -> bool:
        """Whether nothing is left to count."""
        return self.digit == len(DIGITS[self.bits]) or all(prefix < 0 for prefix in self.prefixes)

    @property
    def last(self) -> bool:
        """Whether the digit to count next is the lowest, which tells ties."""
        return self.digit == len(DIGITS[self.bits]) - 1

    def advance(self, counts: Sequence[Sequence[int]]) -> None:
        """Hear the counts of this digit, those of every value for each expert."""
        width = DIGITS[self.bits][self.digit].width
        for i, prefix in enumerate(self.prefixes):
            if prefix < 0:
                continue
            if self.digit == 0:
                known, wanted = sum(counts[i]), self._counts[i]
                self._ranks[i] = wanted(known) if callable(wanted) else wanted
                if self._ranks[i] >= known:
                    self.prefixes[i], self._all[i] = -1, True
                    continue
            value, self._ranks[i] = _find(counts[i], self._ranks[i])
            self.prefixes[i], self._ties[i] = prefix << width | value, counts[i][value]
        self.digit += 1

    def thresholds(self) -> list[float]:
        """As magnitude_select returns them."""
        whole, real = ("<q", "<d") if self.bits == 64 else ("<i", "<f")
        return [
            (-1.0 if every else math.inf)
            if key < 0
            else struct.unpack(real, struct.pack(whole, key))[0]
            for key, every in zip(self.prefixes, self._all, strict=True)
        ]

    def all_ties(self) -> list[bool]:
        """For each expert whether every element that equals its threshold is wanted."""
        found = zip(self.prefixes, self._ranks, self._ties, strict=True)
        return [key >= 0 and rank == ties for key, rank, ties in found]

    def last_ties(self, tiles: Sequence[Sequence[Sequence[int]]]) -> list[LastTie | None]:
        """For each expert where its last tie is, from all tiles' counts of the lowest digit; None:
        nothing was searched for."""
        return [
            None if key < 0 else self._last_tie(i, tiles) for i, key in enumerate(self.prefixes)
        ]

    def _last_tie(self, i: int, tiles: Sequence[Sequence[Sequence[int]]]) -> LastTie:
        value = self.prefixes[i] % (1 << DIGITS[self.bits][-1].width)
        rank, tile = self._ranks[i], 0
        while rank > tiles[tile][i][value]:
            rank -= int(tiles[tile][i][value])
            tile += 1
        return LastTie(tile, rank)


def _find(counts: Sequence[int], rank: int) -> tuple[int, int]:
    """The value of the rank-th largest, and its rank among those with that value."""
    value = len(counts) - 1
    while rank > counts[value]:
        rank -= counts[value]
        value -= 1
    return value, rank

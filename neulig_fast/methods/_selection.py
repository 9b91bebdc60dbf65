"""magnitude_select of task vectors that are seen tile by tile: the arithmetic between the passes.

For every digit, magnitude_histogram of every tile, then :meth:`TiledSelect.advance`. Two or more
machines do the same with the counts of all tiles. Thresholds follow from the last digit, and cuts
from a look for the last tie in the one tile that has it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

from ..ops._digits import DIGITS


class LastTile(NamedTuple):
    """The cut is one past the ``tie``-th element, from 1, of this tile whose magnitude is the
    threshold."""

    tile: int
    tie: int


class TiledSelect:
    """The search for the counts[i]-th largest magnitude of N experts.

    Args:
        counts: how many elements of each expert are wanted.
        bits: of the type of differences: 32, or 64 for fp64 parameters.

    ``digit`` is the one to count next and ``prefixes`` the bits above it, one for each expert; -1
    where all elements or none are wanted, so that nothing is left to count.
    """

    def __init__(self, counts: Sequence[int], bits: int = 32) -> None:
        self.bits = bits
        self.digit = 0
        self.prefixes = [0 if count > 0 else -1 for count in counts]
        self._all = [False] * len(counts)
        self._ranks = list(counts)  # among the magnitudes with the prefix
        self._ties: list[list[int]] = []  # of every tile: magnitudes with the prefix

    @property
    def done(self) -> bool:
        """Whether all digits are known."""
        return self.digit == len(DIGITS[self.bits])

    def advance(self, tiles: Sequence[Sequence[Sequence[int]]]) -> None:
        """Hear the counts of this digit: those of every tile, of every expert, of every value."""
        if self.digit == 0:
            self._ties = [[0] * len(self._ranks) for _ in tiles]
        width = DIGITS[self.bits][self.digit].width
        for i, prefix in enumerate(self.prefixes):
            if prefix < 0:
                continue
            sums = [sum(values) for values in zip(*(tile[i] for tile in tiles), strict=True)]
            if self.digit == 0 and self._ranks[i] >= sum(sums):
                self.prefixes[i], self._all[i] = -1, True
                continue
            value, self._ranks[i] = _find(sums, self._ranks[i])
            self.prefixes[i] = prefix << width | value
            for ties, tile in zip(self._ties, tiles, strict=True):
                ties[i] = tile[i][value]
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

    def last_tiles(self) -> list[LastTile | None]:
        """For each expert the tile with the last tie that counts; None: its cut is 0."""
        return [None if key < 0 else self._last_tile(i) for i, key in enumerate(self.prefixes)]

    def _last_tile(self, i: int) -> LastTile:
        rank, tile = self._ranks[i], 0
        while rank > self._ties[tile][i]:
            rank -= self._ties[tile][i]
            tile += 1
        return LastTile(tile, rank)


def _find(counts: Sequence[int], rank: int) -> tuple[int, int]:
    """The value of the rank-th largest, and its rank among those with that value."""
    value = len(counts) - 1
    while rank > counts[value]:
        rank -= counts[value]
        value -= 1
    return value, rank

"""Greedy joins of a zip, with the largest entry of every row kept.

Looking for the largest of O^2 entries before each of the O joins reads O^3 entries. A join changes
one row and one column, so here every row keeps its own largest entry, and only a row that lost it
is read again, when it is the next candidate.
"""

from __future__ import annotations

import numpy as np


def join_greedily(
    similarity: np.ndarray, networks: int, size: int, repeat: float, budget: int
) -> tuple[np.ndarray, np.ndarray]:
    """The joins that :mod:`neulig_fast.alignment.zip` defines, pair for pair and bit for bit.

    Args:
        similarity: (O, O) fp64, finite; the upper triangle is read.
        networks: N, of O / N units each.
        size: columns to end with.
        repeat: above 0.
        budget: joins that each network may have between its own units; it must leave a pair to
            join until the end.

    Returns:
        ``(labels, accepted)``: (O,) int64, the first member of every unit's column, and
        (O - size,) fp64, the similarity of every join.
    """
    total = len(similarity)
    units = total // networks
    rows = _RowMaxima(similarity)
    left = np.full(networks, budget)
    if budget == 0:
        for network in range(networks):
            rows.close(network * units, (network + 1) * units)
    labels = np.arange(total)
    accepted = np.empty(total - size)
    for step in range(total - size):
        i, j, accepted[step] = rows.largest()
        rows.join(i, j, repeat)
        labels[labels == j] = i
        network = i // units
        if network == j // units:
            left[network] -= 1
            if left[network] == 0:
                rows.close(network * units, (network + 1) * units)
    return labels, accepted


class _RowMaxima:
    """A symmetric matrix that joins change, and the largest entry of every row.

    Row x may be joined with the columns ``first[x]`` and after. ``bound[x]`` is no less than any of
    their entries; ``partner[x]`` is the first that equals it, or -1 where only the bound is known.
    """

    def __init__(self, similarity: np.ndarray) -> None:
        total = len(similarity)
        upper = np.triu(similarity, 1)
        # One column more, so that the last row has an entry to find.
        self.entries = np.full((total, total + 1), -np.inf)
        self.entries[:, :total] = upper + upper.T
        self.first = np.arange(1, total + 1)
        self.bound = np.full(total, np.inf)
        self.partner = np.full(total, -1)

    def largest(self) -> tuple[int, int, float]:
        """``(i, j, entry)``: the largest entry; of equal ones the smallest i, then j."""
        i = int(self.bound.argmax())
        while self.partner[i] < 0:
            self._read(i)
            i = int(self.bound.argmax())
        return i, int(self.partner[i]), float(self.bound[i])

    def join(self, i: int, j: int, repeat: float) -> None:
        """Put column j into column i, i < j."""
        entries, bound, partner = self.entries, self.bound, self.partner
        entries[i] = np.minimum(entries[i], entries[j]) * repeat
        entries[:, i] = entries[i, :-1]
        entries[:, j] = -np.inf
        bound[j] = -np.inf
        partner[(partner == i) | (partner == j)] = -1
        above = entries[:i, i]
        larger = (above > bound[:i]) | ((above == bound[:i]) & (i < partner[:i]))
        larger &= self.first[:i] <= i
        bound[:i][larger] = above[larger]
        partner[:i][larger] = i
        self._read(i)

    def close(self, start: int, stop: int) -> None:
        """No more joins among the columns ``start .. stop``."""
        self.first[start:stop] = stop
        self.partner[start:stop] = -1

    def _read(self, row: int) -> None:
        allowed = self.entries[row, self.first[row] :]
        at = int(allowed.argmax())
        self.bound[row] = allowed[at]
        self.partner[row] = self.first[row] + at

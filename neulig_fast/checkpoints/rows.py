"""Matrices whose rows come from several files, put together while they are read.

Models of different vocabularies are merged after their embeddings were brought into one order of
tokens: a row of the result's is the model's own, another model's, or a mean of those that have one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import dtypes

if TYPE_CHECKING:
    from torch import Tensor

    from .headers import Entry

_ALIGNMENT = 128  # bytes
MEAN = -1


class Rows(NamedTuple):
    """Where V rows come from.

    Attributes:
        sources: matrices of the same width.
        who: (V,) for each row its source's number, or ``MEAN``.
        row: (V,) which one of its source's.
        means: of a row: numbers and rows of the sources that it is the mean of.
    """

    sources: tuple[Entry, ...]
    who: NDArray[np.int32]
    row: NDArray[np.int64]
    means: Mapping[int, tuple[tuple[int, int], ...]]

    @property
    def width(self) -> int:
        """Elements of a row."""
        return prod(self.sources[0].shape[1:])

    @property
    def bytes(self) -> int:
        """To be read, once."""
        counts = [int((self.who == number).sum()) for number in range(len(self.sources))]
        for mean in self.means.values():
            for number, _ in mean:
                counts[number] += 1
        each = [s.bytes // max(s.shape[0], 1) for s in self.sources]
        return sum(count * bytes_ for count, bytes_ in zip(counts, each, strict=True))

    @property
    def held(self) -> str:
        """The type that holds all rows: means are formed in fp32, or fp64."""
        mean = ["F32"] if self.means else []
        return dtypes.common([*(source.held for source in self.sources), *mean])

    def scratch_bytes(self, item: int) -> int:
        """What :func:`read` needs besides its result, beyond what sources need for each element."""
        inner = max(source.fixed_scratch(item) for source in self.sources)
        stored = max(dtypes.as_torch(s.dtype).itemsize for s in self.sources)
        return _aligned(self.width * item) + max(inner, self.width * stored)


Read = Callable[["Entry", int, "Tensor", "Tensor | None"], None]


def read(rows: Rows, start: int, into: Tensor, scratch: Tensor, read_entry: Read) -> None:
    """Elements ``start ..`` of the flattened matrix.

    Args:
        into: (P,) of a type that holds all rows.
        scratch: ``rows.scratch_bytes(...)`` bytes (uint8) or more, and as for reading P elements of
            each source.
        read_entry: from sources: what :meth:`Reader.read` is.
    """
    width, stop = rows.width, start + into.numel()
    for first, last in _runs(rows, start // width, -(-stop // width)):
        low, high = max(start, first * width), min(stop, last * width)
        part, shift = into[low - start : high - start], low - first * width
        number = int(rows.who[first])
        if number != MEAN:
            at = int(rows.row[first]) * width + shift
            read_entry(rows.sources[number], at, part, scratch)
            continue
        own = _aligned(width * into.itemsize)
        one = scratch[: part.nbytes].view(into.dtype)
        part.zero_()
        for number, row in rows.means[first]:
            read_entry(rows.sources[number], row * width + shift, one, scratch[own:])
            part += one
        part /= len(rows.means[first])


def _runs(rows: Rows, first: int, last: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows that lie one after the other in one source; each mean by itself."""
    who, row = rows.who[first:last], rows.row[first:last]
    breaks = (np.diff(who) != 0) | (np.diff(row) != 1) | (who[1:] == MEAN)
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), last - first]
    for begin, end in pairwise(edges):
        yield first + begin, first + end


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

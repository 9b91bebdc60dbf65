"""Low-rank updates of matrices, made while they are read: ``W + scale * left @ right``.

A tile is any range of a flattened matrix; what is added to an element must not depend on which. So
products are formed in blocks of rows that only the matrix's shape decides, by one thread, and a
tile takes of each block what lies within it.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..methods import BLOCK
from . import dtypes

if TYPE_CHECKING:
    from .headers import Entry

_ALIGNMENT = 128  # bytes: a product's bits may depend on where its matrices begin


class LowRank(NamedTuple):
    """``scale * left @ right``, to be added to a matrix (M, N).

    Attributes:
        left: (M, R); stored as (R, M) where ``transposed``.
        right: (R, N); stored as (N, R) where ``transposed``.
    """

    left: Entry
    right: Entry
    scale: float
    transposed: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, R, N."""
        if self.transposed:
            return self.left.elements // self.left.shape[0], self.left.shape[0], self.right.shape[0]
        return self.left.shape[0], self.right.shape[0], prod(self.right.shape[1:])

    @property
    def block_rows(self) -> int:
        """Rows whose products are formed at once."""
        return max(BLOCK // max(self.sizes[2], 1), 1)

    @property
    def bytes(self) -> int:
        """To be read, if each factor is read once."""
        return self.left.bytes + self.right.bytes

    def scratch_bytes(self, item: int) -> int:
        """What :func:`add` needs besides its result, whose elements have ``item`` bytes."""
        return sum(_aligned(size) for size in self._areas(item))

    def _areas(self, item: int) -> tuple[int, int, int]:
        """Bytes of the right factor, of rows of the left one, and of a block of the product.

        The last is also where factors are converted, before there is a product.
        """
        _, rank, columns = self.sizes
        rows = self.block_rows
        stored = max(dtypes.as_torch(entry.dtype).itemsize for entry in (self.left, self.right))
        last = max(rows * columns * item, rank * max(rows, columns) * stored)
        return rank * columns * item, rank * rows * item, last


Read = Callable[["Entry", int, Tensor, "Tensor | None"], None]


def add(update: LowRank, start: int, into: Tensor, scratch: Tensor, read: Read) -> None:
    """Add elements ``start ..`` of an update.

    Args:
        into: (P,) fp32 or fp64.
        scratch: ``update.scratch_bytes(...)`` bytes (uint8), or more.
        read: from entries of files: what :meth:`Reader.read` is.
    """
    rows, rank, columns = update.sizes
    right_area, left_area, area = _split(scratch, update._areas(into.itemsize))
    right = right_area.view(into.dtype)
    read(update.right, 0, right, area)
    right = right.view(columns, rank).T if update.transposed else right.view(rank, columns)
    stop, step = start + into.numel(), update.block_rows
    for first in range(start // columns // step * step, -(-stop // columns), step):
        count = min(step, rows - first)
        left = _left(update, first, count, left_area.view(into.dtype), area, read)
        begin, size = first * columns, count * columns
        block = area[: size * into.itemsize].view(into.dtype)
        torch.mm(left, right, out=block.view(count, columns))
        low, high = max(start, begin), min(stop, begin + size)
        into[low - start : high - start] += block[low - begin : high - begin]


def _left(
    update: LowRank, first: int, count: int, memory: Tensor, scratch: Tensor, read: Read
) -> Tensor:
    """(count, R): scaled rows of the left factor."""
    rows, rank, _ = update.sizes
    found = memory[: count * rank]
    if update.transposed:
        by_rank = found.view(rank, count)
        for k in range(rank):
            read(update.left, k * rows + first, by_rank[k], scratch)
        left = by_rank.T
    else:
        read(update.left, first * rank, found, scratch)
        left = found.view(count, rank)
    # Scaled here, not when it is added: a sum must not be fused with a product in some places only.
    return left.mul_(update.scale)


def _split(scratch: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    found, at = [], 0
    for size in sizes:
        found.append(scratch[at : at + size])
        at += _aligned(size)
    return found


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT

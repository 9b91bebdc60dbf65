"""Tensors of several models as rows: some elements at a time, or all at once where a method must
see them."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...checkpoints.layout import Output
from ...checkpoints.measured import applied
from ...checkpoints.planned import Planned
from ...methods import BLOCK, Method, Statistic, Task, Tile

_STEP = 4 * BLOCK  # elements: of a few models, what a core's cache holds


def blocks(count: int, size: int) -> Iterator[slice]:
    """All of ``count``, ``size`` at a time, the last time up to twice as many: so a sum over models
    sees whole vectors of the instruction set wherever it did in the whole tensor, and adds up in
    the same order."""
    last = max(1, count // size) - 1
    for k in range(last + 1):
        yield slice(k * size, (k + 1) * size if k < last else count)


def tiles(tensors: Sequence[Tensor], elements: int = _STEP) -> Iterator[Tile]:
    """Tensors of one shape, as rows of tiles; each tile lies where the last one did."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    length = len(flat[0])
    memory = flat[0].new_empty(len(flat), min(elements, length))
    for start in range(0, length, elements):
        rows = memory[:, : length - start]
        for row, tensor in zip(rows, flat, strict=True):
            row.copy_(tensor[start : start + elements])
        yield Tile(rows, start)


def merged(method: Method, task: Task, tensors: Sequence[Tensor]) -> Tensor:
    """The result of one of our methods, in the shape and dtype of the tensors.

    Args:
        tensors: the experts', then the base's where the method has one.
    """
    read: list[Tile] = []  # all of them, once something has to be known beforehand

    def measure(statistic: Statistic) -> Any:
        if not read:
            read.extend(tiles(tensors, tensors[0].numel()))
        value = statistic.of(read[0])
        if statistic.over == "blocks":
            return functools.reduce(torch.add, value)
        return [value] if statistic.over == "tiles" else value

    output = Output(task.name, task.dtype, task.shape)
    (apply,) = applied(method, [Planned(task, (), task.dtype, output)], measure)
    out = tensors[0].new_empty(tensors[0].shape)
    for tile in read or tiles(tensors):
        apply(tile, out.view(-1)[tile.start : tile.start + tile.rows.shape[1]])
    return out


def word(value: Any) -> str | None:
    """Of one of mergekit's enumerations."""
    return None if value is None else str(getattr(value, "value", value))

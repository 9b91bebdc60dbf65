"""How a tensor's tiles are merged, for one result or several; what is alike is measured once.

A method may have to know something of a whole tensor before it merges a tile: a threshold, inner
products. Results of one reading differ in settings alone, and often in settings that this does not
depend on: a sweep of ``lambda`` has one threshold. Which they are is not declared but observed,
while a method measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods import Apply, Method, Statistic, Task, Tile
from .planned import Known, Planned


def applied(
    method: Method, job: Sequence[Planned], measure: Callable[[Statistic], Any]
) -> list[Apply]:
    """How tiles of a tensor are merged for each result, once all is measured that the method wants
    to know.

    Args:
        job: the tensor, with other settings each.
        measure: looks at the tensor.
    """
    known: list[tuple[Mapping[str, Any], Any]] = []
    return [
        _in_model(method, planned.task, planned.known)
        if planned.task is not None and planned.known is not None
        else _applied(method, planned.task, measure, known)
        for planned in job
    ]


def _in_model(method: Method, task: Task, known: Known) -> Apply:
    """Of a tensor whose elements' places are those in the whole model."""
    apply = method.apply(task, known.found)
    return lambda tile, out: apply(tile._replace(start=tile.start + known.place), out)


def _applied(
    method: Method,
    task: Task | None,
    measure: Callable[[Statistic], Any],
    known: list[tuple[Mapping[str, Any], Any]],
) -> Apply:
    """``known``: what was measured already, and the settings that it depends on."""
    if task is None:
        return _take_first
    if method.measure is None:
        return method.apply(task, None)
    for settings, found in known:
        if all(task.settings[name] == value for name, value in settings.items()):
            return method.apply(task, found)
    observed = _Observed(task.settings)
    found = _measured(method.measure(replace(task, settings=observed)), measure)
    known.append(({name: task.settings[name] for name in observed.read}, found))
    return method.apply(task, found)


def _measured(steps: Any, measure: Callable[[Statistic], Any]) -> Any:
    try:
        statistic = next(steps)
        while True:
            statistic = steps.send(measure(statistic))
    except StopIteration as done:
        return done.value


def _take_first(tile: Tile, out: Tensor) -> None:
    out.copy_(tile.rows[0])


def answer(statistic: Statistic, tile: Tile) -> Any:
    """A statistic of a tile that is all there is."""
    value = statistic.of(tile)
    if statistic.over == "blocks":
        return added(None, value)
    return [value] if statistic.over == "tiles" else value


def added(total: Tensor | None, blocks: Tensor | Iterable[Tensor]) -> Tensor | None:
    """With one tile's blocks, of which it may have none: each after the other, as no other order
    has the same bits. What comes block by block is added as it comes, and takes no memory."""
    if isinstance(blocks, Tensor):
        rows = blocks if total is None else torch.cat([total[None], blocks])
        return torch.as_tensor(np.add.accumulate(rows.numpy(), axis=0)[-1]) if len(rows) else total
    for block in blocks:
        total = block if total is None else total + block
    return total


class _Observed(Mapping[str, Any]):
    """Settings, and which of them were read."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        value = self._settings[name]
        self.read.add(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

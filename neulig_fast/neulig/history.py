"""What a fit leaves behind, and what it tells while it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class History:
    """What happened in the start that was kept.

    ``boosting`` and ``alignment`` (rounds, T): the loss terms of every step, the latter divided by
    its scaling. ``validation`` (epochs, T): the ensemble's accuracy in percent after every epoch,
    (0, T) without validation. ``epoch``: the one whose weights were kept, from 1. ``starts``: the
    best mean validation accuracy of every start.
    """

    tasks: tuple[str, ...]
    boosting: Tensor
    alignment: Tensor
    validation: Tensor
    epoch: int
    start: int = 0
    starts: tuple[float, ...] = ()
    rounds_per_epoch: int = 1


class EpochReport(NamedTuple):
    """Handed to the callback after every epoch. Mean loss terms; ``accuracy`` None if unknown."""

    start: int
    epoch: int
    boosting: float
    alignment: float
    accuracy: float | None


Callback = Callable[[EpochReport], None]

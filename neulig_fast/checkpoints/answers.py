"""What statistics of tiles amount to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..methods import Statistic, Tile


def answer(statistic: Statistic, tile: Tile) -> Any:
    """A statistic of a tile that is all there is."""
    value = statistic.of(tile)
    if statistic.over == "blocks":
        return add(None, value)
    return [value] if statistic.over == "tiles" else value


def add(total: Tensor | None, blocks: Tensor | Iterable[Tensor]) -> Tensor | None:
    """The sum of blocks that follow, one after the other: no other order has the same bits.

    Args:
        total: of those before; None where there are none.
        blocks: (blocks, ...), or one by one: what is made of large numbers is added as it comes.
    """
    if isinstance(blocks, Tensor):
        rows = blocks if total is None else torch.cat([total[None], blocks])
        return torch.as_tensor(np.add.accumulate(rows.numpy(), axis=0)[-1]) if len(rows) else total
    for block in blocks:
        total = block if total is None else total + block
    return total

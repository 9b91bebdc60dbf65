"""EMR's masks and rescalers: what tells experts apart again when only their union is kept.

    gamma = 1 where sum_i d_i > 0, else -1          tau = gamma max_i |d_i| over d_i of that sign
    M_i = [d_i gamma > 0]                           lambda_i = sum_t mean|d_i| / sum_t mean|M_i tau|

The sums are over the tensors t of a model, as in the authors' code. Expert i is about
theta_0 + lambda_i M_i tau. Kept are, for every tensor of the merge,

    <i>/<tensor>       U8, M_i: a bit for every element, the lowest bit of a byte first
    means/<tensor>     F64 (N, 3): of expert i mean|d_i|, mean|M_i tau|, and what the recipe
                       multiplied tau with

so that nothing has to be known of the whole model before a tensor is written.
:func:`neulig_fast.emr_expert` reads them.

Source: Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging", NeurIPS 2024.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from ._blocks import blocks
from ._method import Task, Tile

if TYPE_CHECKING:
    from torch import Tensor

MEANS = "means"


class Masks:
    """What is kept of one tensor; an :class:`~neulig_fast.methods.Aside`."""

    file: ClassVar[str] = "emr_masks.safetensors"
    format: ClassVar[str] = "neulig_fast.emr_masks.1"

    def __init__(self, task: Task) -> None:
        import torch

        self._task = task
        self._sums = torch.zeros(task.models, 2, dtype=torch.float64)

    @staticmethod
    def outputs(task: Task) -> list[tuple[str, str, tuple[int, ...]]]:
        """Names, types and shapes."""
        packed = (-(-task.elements // 8),)
        masks = [(f"{i}/{task.name}", "U8", packed) for i in range(task.models)]
        return [*masks, (f"{MEANS}/{task.name}", "F64", (task.models, 3))]

    def tile(self, tile: Tile) -> Iterator[tuple[int, memoryview]]:
        """The next bytes of outputs, by their numbers."""
        import numpy as np
        import torch

        for _, _, d in blocks(tile):
            kept, largest = _unified(d)
            means = (d.abs(), torch.where(kept, largest, 0))
            self._sums += torch.stack([x.sum(1, dtype=torch.float64) for x in means], 1).cpu()
            for i, mask in enumerate(kept.cpu().numpy()):
                yield i, np.packbits(mask, bitorder="little").data

    def end(self) -> Iterator[tuple[int, memoryview]]:
        """What is known when all tiles were seen."""
        import torch

        scale = torch.full((self._task.models, 1), self._task.value("lambda"), dtype=torch.float64)
        rows = torch.cat([self._sums / self._task.elements, scale], dim=1)
        yield self._task.models, memoryview(rows.view(torch.uint8).numpy().reshape(-1))


def _unified(d: Tensor) -> tuple[Tensor, Tensor]:
    """Of task vectors (N, P) the masks, and the magnitudes (P,) of tau."""
    import torch

    total = torch.zeros_like(d[0])
    for vector in d:  # in order, as they are merged
        total += vector
    kept = torch.where(total > 0, d > 0, d < 0)
    return kept, torch.where(kept, d.abs(), 0).amax(0)

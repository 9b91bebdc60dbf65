"""Fisher-weighted averaging: every element of a model weighs as much as its Fisher information.

    theta = sum_i w_i F_i theta_i / sum_i w_i F_i,    F_i at least ``floor``

F_i is the diagonal of model i's Fisher information, a checkpoint with the model's names and shapes.
Where all of it is 0, theta is the mean with the weights w_i alone. NaN in it reaches theta.

Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv
2111.09832.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ._method import BLOCK, Apply, Method, Parameter, Task, Tile, of_block

if TYPE_CHECKING:
    from torch import Tensor


def _fisher(task: Task, _: None) -> Apply:
    weights, least = task.each("weight"), task.value("floor")
    shares = [weight / sum(weights) for weight in weights]

    def apply(tile: Tile, out: Tensor) -> None:
        import torch

        from .._checks import accumulation_dtype

        for at in range(0, len(out), BLOCK):
            wide = tile.rows[:, at : at + BLOCK].to(accumulation_dtype(tile.rows.dtype))
            models, fishers = wide[: task.models], wide[task.models :]
            mean, above, below = (torch.zeros_like(wide[0]) for _ in range(3))
            for model, fisher, weight, share in zip(models, fishers, weights, shares, strict=True):
                own = weight * fisher.clamp(min=least)
                above += own * model
                below += own
                mean += share * model
            out[at : at + BLOCK] = torch.where(below == 0, mean, above / below).to(out.dtype)

    return apply


def _all_zero(task: Task) -> Iterator[str]:
    if sum(task.each("weight")) == 0:
        yield f"weights {task.each('weight')} sum to zero"


METHODS = (
    Method(
        name="fisher",
        title="Fisher-weighted averaging",
        source="Matena and Raffel, NeurIPS 2022",
        parameters={
            "fisher": Parameter(None, each=True, kind=str),
            "weight": Parameter(1.0, each=True, low=0),
            "floor": Parameter(1e-6, low=0),
        },
        apply=_fisher,
        beside="fisher",
        faults=_all_zero,
        piece=of_block,
    ),
)

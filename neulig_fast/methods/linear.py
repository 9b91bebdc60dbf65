"""Weighted averages: ``linear`` (model soups), and the whole of a model: ``passthrough``.

    linear        theta = sum_i w_i theta_i, divided by sum_i w_i where ``normalize``
    passthrough   theta = scale theta_1: layers of models one after the other
    neulig        theta = sum_i w_i theta_i, w a trained Portland's mean CoopVec of the data set
                  that a recipe names in the place of weights

Source of linear: Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models
improves accuracy without increasing inference time", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ._method import Apply, Method, Parameter, Task, Tile, weights_tensor


def blended(weights: list[float]) -> Apply:
    """The sum of a tile's rows with these weights."""

    def apply(tile: Tile, out: Tensor) -> None:
        from ..ops import blend_

        blend_(out, weights_tensor(weights, tile.rows), tile.rows)

    return apply


def _linear(task: Task, _: Any) -> Apply:
    weights = task.each("weight")
    if task.value("normalize"):
        total = sum(weights)
        weights = [w / total for w in weights]
    return blended(weights)


def _sums_to_zero(task: Task) -> Iterator[str]:
    if task.value("normalize") and sum(task.each("weight")) == 0:
        yield f"weights {task.each('weight')} sum to zero, they cannot be normalised"


def _neulig(task: Task, _: Any) -> Apply:
    return blended(task.each("weight"))


def _passed(task: Task, _: Any) -> Apply:
    scale = task.each("scale")[0]
    return blended([scale])


METHODS = (
    Method(
        "linear",
        "Linear (model soup)",
        "Wortsman et al., ICML 2022",
        _linear,
        {"weight": Parameter(None, each=True), "normalize": Parameter(True, kind=bool)},
        faults=_sums_to_zero,
    ),
    Method(
        "neulig",
        "NeuLig",
        "arXiv 2503.01268, ICCV 2025",
        _neulig,
        {"weight": Parameter(None, each=True)},
    ),
    Method(
        "passthrough",
        "Passthrough",
        "layers taken as they are",
        _passed,
        {"scale": Parameter(1.0, each=True)},
        most=1,
    ),
)

"""Methods that choose elements by what models agree on: SCE and nearswap; and WiSE-FT.

sce       of the task vectors d_i, the ``select_topk`` share of elements with the largest variance
          over experts is kept; expert i weighs mean(d_i^2); elements elect the sign of their sum
          and are averaged over the experts that agree (Wan et al., "FuseChat", 2024)
nearswap  theta = theta_0 + d_1, where |d_1| is at most ``t``; else a step of ``t`` towards it
wise_ft   theta = theta_0 + alpha d_1 (Wortsman et al., "Robust fine-tuning of zero-shot
          models", CVPR 2022)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from ._blocks import blocks
from ._largest import largest_of
from ._method import (
    BLOCK,
    Apply,
    Measure,
    Method,
    Parameter,
    Statistic,
    Task,
    Tile,
    of_block,
    weights_tensor,
)
from .linear import blended

if TYPE_CHECKING:
    from torch import Tensor


# -- SCE ------------------------------------------------------------------------------------------


class Selected(NamedTuple):
    """Elements whose variance is above ``threshold``, or equal to it before ``cut``; weights."""

    threshold: float
    cut: int
    weights: list[float]


def _select(task: Task) -> Measure:
    found = yield Statistic(_count_varied)
    count = int(int(found) * task.value("select_topk"))
    threshold, cut = 0.0, 0  # all that vary
    if count < int(found):
        (threshold,), (cut,) = yield from largest_of(task, [count], _variances)
    squares = yield Statistic(lambda tile: _squares(tile, threshold, cut))
    total = float(squares.sum())
    weights = (squares / total).tolist() if total > 0 else [1 / task.models] * task.models
    return Selected(threshold, cut, weights)


def _variances(tile: Tile) -> Iterator[tuple[Tensor, None]]:
    return ((variance[None], None) for _, _, variance in _blocks(tile))


def _count_varied(tile: Tile) -> Iterator[Tensor]:
    return ((variance > 0).sum().cpu() for _, _, variance in _blocks(tile))


def _squares(tile: Tile, threshold: float, cut: int) -> Iterator[Tensor]:
    """(N,) for each block: of the elements that are kept."""
    import torch

    for start, d, variance in _blocks(tile):
        kept = _kept(d, variance, start, threshold, cut)
        yield kept.square().sum(1, dtype=torch.float64).cpu()


def _blocks(tile: Tile) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Block by block: its place, task vectors (N, P) and their variance over experts (P,)."""
    for place, _, d in blocks(tile):
        yield tile.start + place.start, d, (d - d.mean(0)).square().mean(0)


def _kept(d: Tensor, variance: Tensor, start: int, threshold: float, cut: int) -> Tensor:
    import torch

    place = torch.arange(start, start + len(variance), device=d.device)
    equal = (variance == threshold) & (place < cut)
    return d * ((variance > threshold) | equal | variance.isnan())


def _sce(task: Task, found: Selected) -> Apply:
    def apply(tile: Tile, out: Tensor) -> None:
        from ..ops import merge_task_vectors

        weights = weights_tensor(found.weights, tile.rows)
        for start, d, variance in _blocks(tile):
            kept = _kept(d, variance, start, found.threshold, found.cut)
            place = slice(start - tile.start, start - tile.start + len(variance))
            merged = merge_task_vectors(kept, weights, elect="sum", divide="weights")
            out[place] = (tile.rows[-1, place].to(d.dtype) + merged).to(out.dtype)

    return apply


# -- one expert and its base ----------------------------------------------------------------------


def _nearswap(task: Task, _: None) -> Apply:
    t = task.value("t")

    def apply(tile: Tile, out: Tensor) -> None:
        from .._checks import accumulation_dtype

        for at in range(0, len(out), BLOCK):
            block = tile.rows[:, at : at + BLOCK]
            wide = block.to(accumulation_dtype(block.dtype))
            out[at : at + BLOCK] = (wide[1] + (wide[0] - wide[1]).clamp(-t, t)).to(out.dtype)

    return apply


def _wise_ft(task: Task, _: None) -> Apply:
    alpha = task.value("alpha")
    return blended([alpha, 1 - alpha])


METHODS = (
    Method(
        name="sce",
        title="SCE",
        source="Wan et al., FuseChat, 2024",
        parameters={"select_topk": Parameter(1.0, low=0, high=1)},
        measure=_select,
        apply=_sce,
        base="needed",
        fewest=2,
        piece=of_block,
    ),
    Method(
        name="nearswap",
        title="NearSwap",
        source="mergekit",
        parameters={"t": Parameter(None, low=0)},
        apply=_nearswap,
        base="needed",
        most=1,
        piece=of_block,
    ),
    Method(
        name="wise_ft",
        title="WiSE-FT",
        source="Wortsman et al., CVPR 2022",
        parameters={"alpha": Parameter(0.5)},
        apply=_wise_ft,
        base="needed",
        most=1,
    ),
)

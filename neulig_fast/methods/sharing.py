"""Methods that tell what experts share from what one has alone: RAM, consensus merging, EMR.

    theta = theta_0 + lambda tau, of task vectors d_i

ram         expert i is active where |d_i| > epsilon; tau is the mean of d_i over the experts that
            are active, so that what one changed alone is kept as it is (Yuan et al., "Behavior
            Knowledge Merge in Reinforced Agentic Models", arXiv 2601.13572)
ramplus_tl  what expert i changed alone is multiplied by 1 + r min(s_i / u_i, alpha), s_i and u_i
            the numbers of a tensor's elements where it is active with others and alone (RAM+)
consensus   tau = sum_i w_i d_i where at least k experts have |d_i| >= l_i |tau - d_i|, l_i their
            tall_mask_lambda; 0 elsewhere (Wang et al., "Localizing Task Information for Improved
            Model Merging and Compression", ICML 2024)
emr         tau has the sign of sum_i d_i, minus where that is zero, and the largest magnitude of
            the d_i of that sign: the unified model of EMR-Merging (Huang et al., NeurIPS 2024),
            whose masks are written beside it (:mod:`.masks`)

With the parity fusionbench, masks of consensus ask for > instead of >=. Where RAM+ has u_i = 0,
nothing is multiplied. NaN is active, and passes the masks of consensus.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ._blocks import blocks
from ._method import (
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
from .masks import Masks

if TYPE_CHECKING:
    from torch import Tensor


# -- RAM ------------------------------------------------------------------------------------------


def _ram(task: Task, _: None) -> Apply:
    def apply(tile: Tile, out: Tensor) -> None:
        import torch

        from ..ops import merge_task_vectors

        # Bounds are inclusive: the next number keeps what is larger.
        above = weights_tensor([task.value("epsilon")] * task.models, tile.rows)
        lower = torch.nextafter(above, torch.full_like(above, torch.inf))
        ones, rows = torch.ones_like(lower), tile.rows
        merge_task_vectors(rows[:-1], ones, rows[-1], lower=lower, divide="count", out=out)

    return apply


def _count(task: Task) -> Measure:
    """(N,): what multiplies the elements that an expert alone changed."""
    shared, alone = (yield Statistic(lambda tile: _counts(task, tile))).tolist()
    r, alpha = task.value("r"), task.value("alpha")
    return [1 + r * min(s / u, alpha) if u else 1.0 for s, u in zip(shared, alone, strict=True)]


def _counts(task: Task, tile: Tile) -> Iterator[Tensor]:
    """(2, N) for each block: of elements where an expert is active with others, and alone."""
    import torch

    for _, _, d in blocks(tile):
        active, together = _active(task, d)
        pair = (active & (together > 1), active & (together == 1))
        yield torch.stack([each.sum(1) for each in pair]).cpu()


def _active(task: Task, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where each expert is active (N, P), and how many are (P,)."""
    active = ~(d.abs() <= task.value("epsilon"))
    return active, active.sum(0)


def _ramplus(task: Task, factors: Sequence[float]) -> Apply:
    def apply(tile: Tile, out: Tensor) -> None:
        import torch

        for place, base, d in blocks(tile):
            active, together = _active(task, d)
            total = torch.zeros_like(base)
            for own, vector, factor in zip(active, d, factors, strict=True):
                scaled = torch.where(together == 1, vector * factor, vector)
                total += torch.where(own, scaled, 0)
            out[place] = (base + total / together.clamp(min=1)).to(out.dtype)

    return apply


# -- consensus and EMR ----------------------------------------------------------------------------


def _consensus(task: Task, _: None) -> Apply:
    weights, bounds = task.each("weight"), task.each("tall_mask_lambda")
    below = operator.le if task.parity == "fusionbench" else operator.lt

    def apply(tile: Tile, out: Tensor) -> None:
        import torch

        for place, base, d in blocks(tile):
            total = torch.zeros_like(base)
            for vector, weight in zip(d, weights, strict=True):
                total += weight * vector
            agreed = torch.zeros_like(base, dtype=torch.int64)
            for vector, bound in zip(d, bounds, strict=True):
                agreed += ~below(vector.abs(), bound * (total - vector).abs())
            total.masked_fill_(agreed < task.value("k"), 0)
            out[place] = (base + task.value("lambda") * total).to(out.dtype)

    return apply


def _emr(task: Task, _: None) -> Apply:
    def apply(tile: Tile, out: Tensor) -> None:
        from ..ops import merge_task_vectors

        how: dict[str, Any] = {"elect": "sum", "zero_sign": -1, "combine": "max"}
        how["lam"] = task.value("lambda")
        ones, rows = weights_tensor([1.0] * task.models, tile.rows), tile.rows
        merge_task_vectors(rows[:-1], ones, rows[-1], out=out, **how)

    return apply


def _more_than_there_are(task: Task) -> Iterator[str]:
    if task.value("k") > task.models:
        yield f"k must be at most the number of models, {task.models}, got {task.value('k')}"


_EPSILON = Parameter(1e-5, low=0)

METHODS = (
    Method(
        name="ram",
        title="RAM",
        source="Yuan et al., arXiv 2601.13572",
        parameters={"epsilon": _EPSILON},
        apply=_ram,
        base="needed",
        piece=of_block,
    ),
    Method(
        name="ramplus_tl",
        title="RAM+, tensor by tensor",
        source="Yuan et al., arXiv 2601.13572",
        parameters={
            "r": Parameter(0.1, low=0),
            "alpha": Parameter(0.2, low=0),
            "epsilon": _EPSILON,
        },
        measure=_count,
        of_model=("epsilon", "r", "alpha"),
        apply=_ramplus,
        base="needed",
        piece=of_block,
    ),
    Method(
        name="consensus",
        title="Consensus merging by TALL masks",
        source="Wang et al., ICML 2024",
        parameters={
            "weight": Parameter(1.0, each=True),
            "tall_mask_lambda": Parameter(0.4, each=True, low=0),
            "k": Parameter(2, low=0, kind=int),
            "lambda": Parameter(1.0),
        },
        apply=_consensus,
        base="needed",
        parities=("mergekit", "fusionbench"),
        faults=_more_than_there_are,
        piece=of_block,
    ),
    Method(
        name="emr",
        title="EMR-Merging, the unified model",
        source="Huang et al., NeurIPS 2024",
        parameters={"lambda": Parameter(1.0)},
        apply=_emr,
        aside=Masks,
        base="needed",
        parities=("paper", "fusionbench"),
        piece=of_block,
    ),
)

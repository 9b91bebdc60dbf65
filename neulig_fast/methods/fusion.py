"""Arcee Fusion: the elements of one expert that matter most, the others from its base.

    importance = |theta_1 - theta_0| KL(softmax(x_1) || softmax(x_0))
    theta = theta_1 where importance >= median + 1.5 (q_3 - q_1), else theta_0

x_1 and x_0 are the rows of an element, along the last dimension. The median and the quartiles q of
a tensor's n importances are those of place floor(q (n - 1)) in ascending order. The divergence is
formed in fp64. NaN is the largest of importances: a row that has it is the expert's.

Source: mergekit; Goddard et al., "Arcee's MergeKit", EMNLP 2024.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import floor, inf
from typing import TYPE_CHECKING, NamedTuple

from ._bands import Band, bands, cut_bands, of_band
from ._largest import magnitudes_of_rank
from ._method import Apply, Measure, Method, Task, Tile

if TYPE_CHECKING:
    from torch import Tensor

_QUARTILES = (0.25, 0.5, 0.75)


class Fused(NamedTuple):
    """Bands that tiles cut, and the least importance that is taken."""

    cut: Mapping[int, Tensor]
    threshold: float


def _measure(task: Task) -> Measure:
    cut = yield from cut_bands(task)
    low, middle, high = yield from _quartiles(task, cut)
    return Fused(cut, middle + 1.5 * (high - low))


def _quartiles(task: Task, cut: Mapping[int, Tensor]) -> Measure:
    """Of all importances."""
    ranks = [[task.elements - floor(share * (task.elements - 1))] for share in _QUARTILES]

    def numbers(tile: Tile) -> Iterator[tuple[Tensor, None]]:
        for known in _importances(task, tile, cut):
            yield known.nan_to_num(nan=inf, posinf=inf)[None], None

    found = yield from magnitudes_of_rank(task, ranks, numbers)
    return [value for (value,) in found]


def _importances(task: Task, tile: Tile, cut: Mapping[int, Tensor]) -> Iterator[Tensor]:
    """(P,) of every band, in the type of sums."""
    return (_importance(band)[band.of_band] for band in bands(task, tile, cut))


def _importance(band: Band) -> Tensor:
    """(R * W,) of a band."""
    from .._checks import accumulation_dtype

    x, base = band.rows.double()
    log, other = x.log_softmax(-1), base.log_softmax(-1)
    divergence = (log.exp() * (log - other)).sum(-1, keepdim=True).clamp(min=0)
    return ((x - base).abs() * divergence).flatten().to(accumulation_dtype(band.rows.dtype))


def _fusion(task: Task, fused: Fused) -> Apply:
    def apply(tile: Tile, out: Tensor) -> None:
        import torch

        for band in bands(task, tile, fused.cut):
            # In fp64: a threshold is between numbers of fp32.
            taken = ~(_importance(band)[band.of_band].double() < fused.threshold)
            expert, base = tile.rows[:, band.of_tile]
            out[band.of_tile] = torch.where(taken, expert, base).to(out.dtype)

    return apply


METHODS = (
    Method(
        name="arcee_fusion",
        title="Arcee Fusion",
        source="Goddard et al., EMNLP 2024",
        measure=_measure,
        apply=_fusion,
        base="needed",
        most=1,
        piece=of_band,
    ),
)

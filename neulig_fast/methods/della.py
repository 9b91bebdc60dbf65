"""DELLA: elements of task vectors are dropped at random, small ones of a row more often.

    p = density + epsilon (1 - 2 r / (W - 1))     the chance to be kept of the element of rank r
                                                  among the W of its row, 0 the largest magnitude

In a row of one element p is the density. Of equal magnitudes the smaller index is the larger one;
NaN is larger than any. A density of 1 keeps everything and one of 0 nothing, whatever epsilon is.
What is kept is merged as DARE's (:mod:`.task_vectors`), and drawn as DARE's: with epsilon 0 the
same elements are. ``rescale`` gives a task vector its sum of magnitudes back (parity
mergekit), or divides every element by its p (paper).

Source: Deep, Bhardwaj, Poria, "DELLA-Merging: Reducing Interference in Model Merging through
Magnitude-Based Sampling", arXiv 2406.11617.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ._bands import Band, bands, cut_bands, of_band
from ._kept import Kept, restoring
from ._method import Apply, Measure, Method, Parameter, Statistic, Task, Tile, weights_tensor
from .task_vectors import dropping, election, merged

if TYPE_CHECKING:
    from torch import Tensor

_SLACK = 1e-9  # of sums of two decimal fractions


class Drawn(NamedTuple):
    """Bands that tiles cut, and what makes up for the elements that are dropped."""

    cut: Mapping[int, Tensor]
    scales: Sequence[float] | None = None


def _draw(task: Task) -> Measure:
    if all(density == 1 for density in task.each("density")):
        return None
    cut = yield from cut_bands(task)
    if not task.value("rescale") or task.parity != "mergekit":
        return Drawn(cut)
    before, after = (yield Statistic(lambda tile: _sums(task, tile, cut))).unbind()
    return Drawn(cut, restoring(before, after).tolist())


def _sums(task: Task, tile: Tile, cut: Mapping[int, Tensor]) -> Iterator[Tensor]:
    """(2, N) for each band: sums of magnitudes before and after elements are dropped, in fp64."""
    import torch

    for band in bands(task, tile, cut):
        if band.of_band.start == 0:
            pair = (_task_vectors(band).flatten(1), _kept(task, band))
            each = [x.abs().sum(1, dtype=torch.float64) for x in pair]
            yield torch.stack(each).cpu()


def _task_vectors(band: Band) -> Tensor:
    from .._checks import accumulation_dtype

    wide = band.rows.to(accumulation_dtype(band.rows.dtype))
    return wide[:-1] - wide[-1]


def _kept(task: Task, band: Band) -> Tensor:
    """(N, R * W): task vectors of a band without what is dropped, multiplied as the paper does."""
    import torch

    from ..ops._task_vectors import words

    d = _task_vectors(band)
    chances = _chances(task, d.shape[-1]).to(d.device)
    streams = torch.tensor(task.streams(), device=d.device)
    for i, rows in enumerate(d):
        chance = chances[i][_ranks(rows.abs())]
        drawn = words(task.seed, band.start, rows.numel(), streams[i]).view_as(rows)
        share = chance.float().double()  # what DARE draws by
        dropped = drawn >= (share * 2**32).round().long()
        if task.value("rescale") and task.parity == "paper":
            rows *= (1 / chance.clamp(min=2.0**-32)).to(d.dtype)
        rows.masked_fill_(dropped, 0)
    return d.flatten(1)


def _chances(task: Task, width: int) -> Tensor:
    """(N, W) in fp64: of every expert's elements by their rank."""
    import torch

    shares = torch.tensor(task.each("density"), dtype=torch.float64)[:, None]
    wings = torch.tensor(task.each("epsilon"), dtype=torch.float64)[:, None]
    wings = wings.masked_fill((shares == 0) | (shares == 1), 0)
    place = torch.linspace(1, -1, width, dtype=torch.float64) if width > 1 else torch.zeros(1)
    return (shares + wings * place).clamp(0, 1)


def _ranks(magnitudes: Tensor) -> Tensor:
    """(R, W): 0 for the largest of a row."""
    import torch

    order = magnitudes.argsort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def _della(elected: bool) -> Callable[[Task, Any], Apply]:
    def of_task(task: Task, drawn: Drawn | None) -> Apply:
        if drawn is None:
            return merged(elected)(task, Kept({}))
        how = election(task, elected)

        def apply(tile: Tile, out: Tensor) -> None:
            from ..ops import merge_task_vectors

            weights = weights_tensor(task.each("weight"), tile.rows)
            if drawn.scales is not None:
                how["scales"] = weights_tensor(drawn.scales, tile.rows)
            for band in bands(task, tile, drawn.cut):
                kept = _kept(task, band)[:, band.of_band]
                change = merge_task_vectors(kept, weights, **how)
                base = tile.rows[-1, band.of_tile].to(change.dtype)
                out[band.of_tile] = (base + change).to(out.dtype)

        return apply

    return of_task


def _beyond_chances(task: Task) -> Iterator[str]:
    for density, epsilon in zip(task.each("density"), task.each("epsilon"), strict=True):
        low, high = density - epsilon, density + epsilon
        if 0 < density < 1 and not -_SLACK <= low <= high <= 1 + _SLACK:
            yield (
                f"density {density:g} with epsilon {epsilon:g}: chances from {low:g} to {high:g}, "
                "must be from 0 to 1"
            )


_EPSILON = Parameter(0.15, each=True, low=0, high=0.5)

METHODS = (
    Method(
        name="della",
        title="DELLA",
        source="Deep et al., arXiv 2406.11617",
        parameters=dropping(normalize=True, rescale=True, epsilon=_EPSILON),
        measure=_draw,
        apply=_della(elected=True),
        base="needed",
        parities=("mergekit", "paper"),
        faults=_beyond_chances,
        piece=of_band,
    ),
    Method(
        name="della_linear",
        title="DELLA without TIES",
        source="Deep et al., arXiv 2406.11617",
        parameters=dropping(normalize=False, rescale=True, epsilon=_EPSILON),
        measure=_draw,
        apply=_della(elected=False),
        base="needed",
        parities=("mergekit", "paper"),
        faults=_beyond_chances,
        piece=of_band,
    ),
)

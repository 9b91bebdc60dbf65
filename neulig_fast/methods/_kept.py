"""Which elements of task vectors are kept: what methods of task vectors measure first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ._blocks import blocks
from ._largest import largest, largest_of, several
from ._method import Measure, Statistic, Task, Tile, bounds, weights_tensor

if TYPE_CHECKING:
    from torch import Tensor

_BOUNDS = ("lower", "upper")
_LEAST = 1e-7  # sums of magnitudes below it mergekit does not make up for


class Kept(NamedTuple):
    """Which elements of every task vector are kept, as :func:`neulig_fast.merge_task_vectors` has
    it, what makes up for the others, and which sign a sum of zero elects."""

    rule: Mapping[str, Any]
    scales: Sequence[float] | None = None
    zero_sign: int = 1

    def vectors(self, tile: Tile) -> Iterator[tuple[Tensor, None]]:
        """Block by block: task vectors (N, P), 0 where they are dropped."""
        from ..ops import merge_task_vectors

        for place, _, d in blocks(tile):
            start, rule = tile.start + place.start, tensors(self.rule, d)
            seed = {"seed": rule.pop("seed")} if "seed" in rule else {}
            for i, row in enumerate(d):
                own = {name: values[i : i + 1] for name, values in rule.items()}
                row.copy_(merge_task_vectors(row[None], d.new_ones(1), start=start, **own, **seed))
            yield d, None


def everything(task: Task) -> Measure:
    """Of every task vector."""
    return Kept({})
    yield  # a generator that wants to know nothing


def largest_elements(task: Task) -> Measure:
    """The density * n largest: TIES."""
    if task.parity == "fusionbench":
        return (yield from _with_all_ties(task, Kept({}), task.each("density")))
    n = task.elements
    kept = yield from _between(task, [0] * task.models, [int(d * n) for d in task.each("density")])
    return kept


def _with_all_ties(task: Task, kept: Kept, shares: Sequence[float]) -> Measure:
    """As FusionBench trims what is kept, and the sign that it gives to sums of zero."""
    counts = [int(share * task.elements) + 1 for share in shares]
    bound: dict[str, Sequence[float]] = {}
    if any(count < task.elements for count in counts):
        trimmed = largest_of(task, counts, kept.vectors) if kept.rule else largest(task, counts)
        bound["lower"], _ = yield from trimmed
    kept = kept._replace(rule={**kept.rule, **bound})
    signs = int((yield Statistic(lambda tile: _elected_signs(tile, kept))))
    nobody = 0 if task.value("merge_func") == "max" else -1
    return kept._replace(zero_sign=(signs > 0) - (signs < 0) or nobody)


def without_outliers(task: Task) -> Measure:
    """Without the gamma * n largest the density * n largest that are left: Model Breadcrumbs."""
    n = task.elements
    wanted = [int(density * n) for density in task.each("density")]
    outliers = [int(gamma * n) for gamma in task.each("gamma")]
    dropped = [min(top, n - count) for top, count in zip(outliers, wanted, strict=True)]
    kept = yield from _between(task, dropped, wanted)
    return kept


def _between(task: Task, dropped: Sequence[int], wanted: Sequence[int]) -> Measure:
    """The ``wanted`` largest that are left without the ``dropped`` largest."""
    rule: dict[str, Any] = {}
    last = [first + count for first, count in zip(dropped, wanted, strict=True)]
    bounds: dict[str, Sequence[int]]
    bounds = {"lower": last} if any(count < task.elements for count in last) else {}
    bounds |= {"upper": dropped} if any(dropped) else {}
    if bounds:
        found = yield from several(task, list(bounds.values()))
        for name, (thresholds, cuts) in zip(bounds, found, strict=True):
            rule[name], rule[f"{name}_cut"] = thresholds, cuts
    return (yield from _rescaled(task, rule))


def drawn(task: Task) -> Measure:
    """Each with the chance density: DARE."""
    density = [float(d) for d in task.each("density")]
    if all(d == 1 for d in density):
        return Kept({})
    rule = {"density": density, "seed": task.seed, "streams": task.streams()}
    return (yield from _rescaled(task, rule))


def drawn_and_trimmed(task: Task) -> Measure:
    """Of what was drawn, FusionBench keeps the largest: DARE with TIES."""
    kept = yield from drawn(task)
    if task.parity != "fusionbench":
        return kept
    return (yield from _with_all_ties(task, kept, [task.value("threshold")] * task.models))


def _rescaled(task: Task, rule: Mapping[str, Any]) -> Measure:
    if not rule or not task.value("rescale"):
        return Kept(rule)
    if task.parity != "mergekit":
        return Kept(rule, [1 / d if d > 0 else 1.0 for d in task.each("density")])
    before, after = (yield Statistic(lambda tile: _magnitude_sums(tile, rule))).unbind()
    return Kept(rule, restoring(before, after).tolist())


def restoring(before: Tensor, after: Tensor) -> Tensor:
    """(N,): what task vectors whose magnitudes sum to ``after`` have to be multiplied by to have
    the sums ``before`` again; 1 where either is next to nothing."""
    return (before / after).masked_fill((before < _LEAST) | (after < _LEAST), 1.0)


def _magnitude_sums(tile: Tile, rule: Mapping[str, Any]) -> Tensor:
    """(blocks, 2, N): sums of |d_i|, before and after elements are dropped."""
    from ..ops import magnitude_sums

    rows = tile.rows
    kept = tensors(rule, rows)
    return magnitude_sums(rows[:-1], rows[-1], bounds(tile), start=tile.start, **kept).cpu()


def _elected_signs(tile: Tile, kept: Kept) -> Iterator[Tensor]:
    """() for each block: sum of the signs that elements' sums over experts have."""
    from ..ops import merge_task_vectors

    for place, _, d in blocks(tile):
        start = tile.start + place.start
        scales = weights_tensor(kept.scales or [1.0] * len(d), d)
        total = merge_task_vectors(d, scales, start=start, **tensors(kept.rule, d))
        yield ((total > 0).sum() - (total < 0).sum()).cpu()


def tensors(rule: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """A rule on the device of ``rows``."""
    import torch

    def tensor(name: str, values: Any) -> Any:
        if name == "seed":
            return values
        bound = torch.promote_types(rows.dtype, torch.float32) if name in _BOUNDS else None
        return torch.as_tensor(values, dtype=bound, device=rows.device)

    return {name: tensor(name, values) for name, values in rule.items()}

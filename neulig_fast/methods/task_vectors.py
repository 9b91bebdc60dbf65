"""Methods of task vectors: task arithmetic, TIES, DARE, Model Breadcrumbs.

    d_i = theta_i - theta_0                       the task vector of expert i
    theta = theta_0 + lambda sum_i w_i s_i m_i d_i

m_i keeps some elements of d_i, s_i makes up for those it drops, and with ``normalize`` the sum is
divided by the weights' sum. ``_ties``: every element elects a sign, that of its sum, and only the
experts that agree take part, in the divisor too.

    task_arithmetic    all elements: Ilharco et al., ICLR 2023
    ties               the density * n largest of a tensor: Yadav et al., NeurIPS 2023
    dare_linear, _ties each element with the chance density: Yu et al., ICML 2024
    breadcrumbs, _ties without the gamma * n largest, the density * n largest that are left:
                       Davari and Belilovsky, ECCV 2024

What frameworks mean differs, and ``parity`` chooses:

    mergekit     signs are elected by weighted task vectors; ``rescale`` gives a task vector the sum
                 of magnitudes back that it had before elements were dropped
    peft         by unweighted ones; the divisor is the number of experts that agree; ``rescale``
                 divides by density
    paper        as mergekit's, but ``rescale`` divides by density

Ties among magnitudes go to the smaller index. A random decision depends on the seed, the tensor's
name, the expert's number and the element's index, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ._largest import largest
from ._method import (
    Apply,
    Measure,
    Method,
    Parameter,
    Statistic,
    Task,
    Tile,
    blocks,
    weights_tensor,
)

if TYPE_CHECKING:
    from torch import Tensor


class Kept(NamedTuple):
    """Which elements of every task vector are kept, as :func:`neulig_fast.merge_task_vectors` has
    it, and what makes up for the others."""

    rule: Mapping[str, Any]
    scales: Sequence[float] | None = None


# -- which elements are kept ----------------------------------------------------------------------


def _all(task: Task) -> Measure:
    return Kept({})
    yield  # a generator that wants to know nothing


def _largest(task: Task) -> Measure:
    n = task.elements
    kept = yield from _between(task, [0] * task.models, [int(d * n) for d in task.each("density")])
    return kept


def _without_outliers(task: Task) -> Measure:
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
    if any(count < task.elements for count in last):
        rule["lower"], rule["lower_cut"] = yield from largest(task, last)
    if any(dropped):
        rule["upper"], rule["upper_cut"] = yield from largest(task, dropped)
    return (yield from _rescaled(task, rule))


def _drawn(task: Task) -> Measure:
    density = task.each("density")
    if all(d == 1 for d in density):
        return Kept({})
    rule = {"density": density, "seed": task.seed, "streams": task.streams()}
    return (yield from _rescaled(task, rule))


def _rescaled(task: Task, rule: Mapping[str, Any]) -> Measure:
    if not rule or not task.value("rescale"):
        return Kept(rule)
    if task.parity != "mergekit":
        return Kept(rule, [1 / d if d > 0 else 1.0 for d in task.each("density")])
    before, after = (yield Statistic(lambda tile: _magnitude_sums(tile, rule))).unbind()
    return Kept(rule, restoring(before, after))


def restoring(before: Tensor, after: Tensor) -> list[float]:
    """What task vectors whose magnitudes sum to ``after``, (N,), have to be multiplied by to have
    the sums ``before`` again; 1 where nothing is left."""
    return (before / after.where(after > 0, before.where(before > 0, 1))).tolist()


def _magnitude_sums(tile: Tile, rule: Mapping[str, Any]) -> Tensor:
    """(blocks, 2, N): sums of |d_i|, before and after elements are dropped."""
    from ..ops import magnitude_sums

    rows = tile.rows
    rule = _tensors(rule, rows)
    return magnitude_sums(rows[:-1], rows[-1], blocks(tile), start=tile.start, **rule).cpu()


def _tensors(rule: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """A rule on the device of ``rows``."""
    import torch

    def tensor(name: str, values: Any) -> Any:
        if name == "seed":
            return values
        given = torch.as_tensor(values, device=rows.device)
        if name in ("lower", "upper"):
            given = given.to(torch.promote_types(rows.dtype, torch.float32))
        return given

    return {name: tensor(name, values) for name, values in rule.items()}


# -- how they are merged --------------------------------------------------------------------------


def election(task: Task, elected: bool) -> dict[str, Any]:
    """How :func:`neulig_fast.merge_task_vectors` adds up what is kept."""
    how: dict[str, Any] = {"lam": task.value("lambda")}
    if elected:
        how["elect"] = "sum" if task.parity == "peft" else "weighted_sum"
    if task.value("normalize"):
        how["divide"] = "count" if task.parity == "peft" and elected else "weights"
    return how


def merged(elected: bool) -> Callable[[Task, Any], Apply]:
    """The sum of task vectors, of the elements that were :class:`Kept`."""

    def of_task(task: Task, kept: Kept) -> Apply:
        how = election(task, elected)

        def apply(tile: Tile, out: Tensor) -> None:
            from ..ops import merge_task_vectors

            rows = tile.rows
            if kept.scales is not None:
                how["scales"] = weights_tensor(kept.scales, rows)
            weights = weights_tensor(task.each("weight"), rows)
            rule = _tensors(kept.rule, rows)
            merge_task_vectors(
                rows[:-1], weights, rows[-1], start=tile.start, out=out, **rule, **how
            )

        return apply

    return of_task


# -- the table ------------------------------------------------------------------------------------

_PARITIES = ("mergekit", "peft", "paper")


def parameters(normalize: bool, **more: Parameter) -> dict[str, Parameter]:
    """Of methods of task vectors."""
    return {
        "weight": Parameter(None, each=True),
        "lambda": Parameter(1.0),
        "normalize": Parameter(normalize, kind=bool),
        **more,
    }


def dropping(normalize: bool, rescale: bool, **more: Parameter) -> dict[str, Parameter]:
    """Of methods that drop elements."""
    density = Parameter(1.0, each=True, low=0, high=1)
    return parameters(normalize, density=density, rescale=Parameter(rescale, kind=bool), **more)


_GAMMA = Parameter(0.01, each=True, low=0, high=1)

METHODS = (
    Method(
        name="task_arithmetic",
        title="Task Arithmetic",
        source="Ilharco et al., ICLR 2023",
        parameters=parameters(normalize=False),
        measure=_all,
        apply=merged(elected=False),
        base="needed",
    ),
    Method(
        name="ties",
        title="TIES-Merging",
        source="Yadav et al., NeurIPS 2023",
        parameters=dropping(normalize=True, rescale=False),
        measure=_largest,
        passes=1,
        apply=merged(elected=True),
        base="needed",
        parities=_PARITIES,
    ),
    Method(
        name="dare_linear",
        title="DARE",
        source="Yu et al., ICML 2024",
        parameters=dropping(normalize=False, rescale=True),
        measure=_drawn,
        passes=1,
        apply=merged(elected=False),
        base="needed",
        parities=_PARITIES,
    ),
    Method(
        name="dare_ties",
        title="DARE with TIES",
        source="Yu et al., ICML 2024; Yadav et al., NeurIPS 2023",
        parameters=dropping(normalize=False, rescale=True),
        measure=_drawn,
        passes=1,
        apply=merged(elected=True),
        base="needed",
        parities=_PARITIES,
    ),
    Method(
        name="breadcrumbs",
        title="Model Breadcrumbs",
        source="Davari and Belilovsky, ECCV 2024",
        parameters=dropping(normalize=False, rescale=False, gamma=_GAMMA),
        measure=_without_outliers,
        passes=2,
        apply=merged(elected=False),
        base="needed",
    ),
    Method(
        name="breadcrumbs_ties",
        title="Model Breadcrumbs with TIES",
        source="Davari and Belilovsky, ECCV 2024; Yadav et al., NeurIPS 2023",
        parameters=dropping(normalize=False, rescale=False, gamma=_GAMMA),
        measure=_without_outliers,
        passes=2,
        apply=merged(elected=True),
        base="needed",
    ),
)

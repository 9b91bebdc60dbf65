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
    peft         by unweighted ones, or by how many have which sign (``majority_sign_method:
                 frequency``); the divisor is the number of experts that agree; ``rescale`` divides
                 by density
    paper        as mergekit's, but ``rescale`` divides by density
    fusionbench  DARE as the paper's. TIES sees the model as one tensor and keeps all that is at
                 least the (density * n + 1)-th largest magnitude; dare_ties does so, with
                 ``threshold`` for density, with what was drawn. Signs are elected by unweighted
                 task vectors, those of zero sums by the sum of all signs (where that is zero too
                 minus; nobody's for max). ``merge_func``: sum, mean over those that agree, or max

Otherwise ties among magnitudes go to the smaller index. A random decision depends on the seed, the
tensor's name, the expert's number and the element's index, on nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ._kept import (
    Kept,
    drawn,
    drawn_and_trimmed,
    everything,
    largest_elements,
    tensors,
    without_outliers,
)
from ._method import BLOCK, Apply, Method, Parameter, Task, Tile, weights_tensor

if TYPE_CHECKING:
    from torch import Tensor


# -- how they are merged --------------------------------------------------------------------------

_MAJORITIES = {"total": "sum", "frequency": "count"}  # peft's words and the operator's
_MERGED = {"sum": {}, "mean": {"divide": "count"}, "max": {"combine": "max"}}


def election(task: Task, elected: bool) -> dict[str, Any]:
    """How :func:`neulig_fast.merge_task_vectors` adds up what is kept."""
    how: dict[str, Any] = {"lam": task.value("lambda")}
    if elected:
        how["elect"] = "weighted_sum" if task.parity in ("mergekit", "paper") else "sum"
    if elected and task.parity == "peft":
        how["elect"] = _MAJORITIES[task.value("majority_sign_method")]
    if task.parity == "fusionbench" and elected:
        return how | _MERGED[task.value("merge_func")]
    if task.value("normalize"):
        how["divide"] = "count" if task.parity == "peft" and elected else "weights"
    return how


def merged(elected: bool) -> Callable[[Task, Any], Apply]:
    """The sum of task vectors, of the elements that were :class:`Kept`."""

    def of_task(task: Task, kept: Kept) -> Apply:
        how = election(task, elected) | {"zero_sign": kept.zero_sign}

        def apply(tile: Tile, out: Tensor) -> None:
            from ..ops import merge_task_vectors

            rows = tile.rows
            if kept.scales is not None:
                how["scales"] = weights_tensor(kept.scales, rows)
            weights = weights_tensor(task.each("weight"), rows)
            rule = tensors(kept.rule, rows)
            merge_task_vectors(
                rows[:-1], weights, rows[-1], start=tile.start, out=out, **rule, **how
            )

        return apply

    return of_task


# -- the table ------------------------------------------------------------------------------------

_PARITIES = ("mergekit", "peft", "paper")
_ALL_PARITIES = (*_PARITIES, "fusionbench")


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


def _majority_of_another(task: Task) -> Iterator[str]:
    majority = task.value("majority_sign_method")
    if task.parity != "peft" and majority != "total":
        yield (
            f"majority_sign_method: {majority} is peft's: it needs parity: peft below neulig_fast, "
            f"got {task.parity}"
        )


def _signs(task: Task) -> int:
    """FusionBench's sign of the sum of all signs is counted block by block."""
    return BLOCK if task.parity == "fusionbench" else 0


_MERGE_FUNC = Parameter("sum", kind=str, words=("sum", "mean", "max"))
_MAJORITY = {"majority_sign_method": Parameter("total", kind=str, words=tuple(_MAJORITIES))}
_GAMMA = Parameter(0.01, each=True, low=0, high=1)

METHODS = (
    Method(
        name="task_arithmetic",
        title="Task Arithmetic",
        source="Ilharco et al., ICLR 2023",
        parameters=parameters(normalize=False),
        measure=everything,
        apply=merged(elected=False),
        base="needed",
        parities=("mergekit", "fusionbench"),
    ),
    Method(
        name="ties",
        title="TIES-Merging",
        source="Yadav et al., NeurIPS 2023",
        parameters=dropping(normalize=True, rescale=False, merge_func=_MERGE_FUNC, **_MAJORITY),
        measure=largest_elements,
        of_model=("density", "rescale", "merge_func"),
        scopes={"fusionbench": "model"},
        apply=merged(elected=True),
        base="needed",
        parities=_ALL_PARITIES,
        faults=_majority_of_another,
        only={
            "merge_func": ("fusionbench",),
            **dict.fromkeys(("normalize", "rescale"), _PARITIES),
        },
        piece=_signs,
    ),
    Method(
        name="dare_linear",
        title="DARE",
        source="Yu et al., ICML 2024",
        parameters=dropping(normalize=False, rescale=True),
        measure=drawn,
        apply=merged(elected=False),
        base="needed",
        parities=_ALL_PARITIES,
    ),
    Method(
        name="dare_ties",
        title="DARE with TIES",
        source="Yu et al., ICML 2024; Yadav et al., NeurIPS 2023",
        parameters=dropping(
            normalize=False,
            rescale=True,
            merge_func=_MERGE_FUNC,
            threshold=Parameter(1.0, low=0, high=1),
            **_MAJORITY,
        ),
        measure=drawn_and_trimmed,
        of_model=("density", "rescale", "merge_func", "threshold"),
        scopes={"fusionbench": "model"},
        apply=merged(elected=True),
        base="needed",
        parities=_ALL_PARITIES,
        faults=_majority_of_another,
        only={
            **dict.fromkeys(("merge_func", "threshold"), ("fusionbench",)),
            "normalize": _PARITIES,
        },
        piece=_signs,
    ),
    Method(
        name="breadcrumbs",
        title="Model Breadcrumbs",
        source="Davari and Belilovsky, ECCV 2024",
        parameters=dropping(normalize=False, rescale=False, gamma=_GAMMA),
        measure=without_outliers,
        of_model=("density", "gamma", "rescale"),
        apply=merged(elected=False),
        base="needed",
    ),
    Method(
        name="breadcrumbs_ties",
        title="Model Breadcrumbs with TIES",
        source="Davari and Belilovsky, ECCV 2024; Yadav et al., NeurIPS 2023",
        parameters=dropping(normalize=False, rescale=False, gamma=_GAMMA),
        measure=without_outliers,
        of_model=("density", "gamma", "rescale"),
        apply=merged(elected=True),
        base="needed",
    ),
)

"""Means on spheres: slerp, nuslerp, multislerp, the Karcher mean; and Model Stock.

Each reads inner products first and is a weighted sum of rows then:

    slerp        theta = (sin((1-t) a) theta_0 + sin(t a) theta_1) / sin a, a the angle between the
                 base theta_0 and theta_1 (Shoemake, SIGGRAPH 1985); t = 0 is the base
    nuslerp      the same of two models with t = w_1 / (w_0 + w_1), or of their task vectors
    multislerp   one step from the normalised weighted mean m: the weighted mean of the unit
                 vectors, projected onto the tangent space at m, back by exp_m, times the weighted
                 mean of norms (Goddard, mergekit)
    karcher      steps with equal weights and log_m in place of the projection, until they are
                 short: the Karcher mean (Karcher, 1977), times the mean of norms
    model_stock  theta_0 + r (mean - theta_0), r = N c / (1 + (N - 1) c), c the mean cosine between
                 task vectors (Jang, Yun, Han, "Model Stock", ECCV 2024)

``nuslerp_flatten: false`` and ``filter_wise`` do so with every row of a tensor, along the last
dimension; with ``nuslerp_row_wise`` too nuslerp does with every column, along the first.

Where an angle is too small for its sine (cosine above 0.9995, for nuslerp sine below 1e-8), slerp
is linear, as mergekit's; a vector of zeros is at right angles to all. Unit vectors whose mean is
shorter than 1e-3 have no direction in common: that mean itself is taken. Task vectors whose
directions cancel have no ratio r, and leave the base; norms whose product is below 1e-6 are
divided by that, as in mergekit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ._bands import of_band
from ._gram import gram
from ._method import BLOCK, Apply, Measure, Method, Parameter, Task
from ._vectors import (
    MOST_COLUMNS,
    columns,
    columns_on_sphere,
    measure_columns,
    measure_rows,
    rows_on_sphere,
)
from .linear import blended

if TYPE_CHECKING:
    import numpy as np

_PARALLEL = 0.9995  # cosine
_SMALL = 1e-8
_TINY = 1e-300
_LEAST = 1e-6  # by which Model Stock divides
_CANCELLED = 1e-6  # a mean's square, which products in fp32 know to 1e-7 of those of its parts


def _measure_rows(task: Task) -> Measure:
    return (yield from gram(base=False))


def _measure_deltas(task: Task) -> Measure:
    return (yield from gram(base=task.base))


def _on_rows(task: Task, coefficients: Sequence[float]) -> Apply:
    """The sum of task vectors, or of models without a base, with these coefficients."""
    weights = [float(c) for c in coefficients]
    return blended([*weights, 1.0 - sum(weights)] if task.base else weights)


def _between(g: np.ndarray, t: float, parallel: float) -> np.ndarray:
    """Coefficients (..., 2) of two vectors at ``t`` on the arc between them."""
    import numpy as np

    cosine = np.clip(_cosines(g)[..., 0, 1], -1, 1)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    linear = (np.abs(cosine) > parallel) | (sine < _SMALL)
    sine = np.where(linear, 1, sine)
    first = np.where(linear, 1 - t, np.sin((1 - t) * angle) / sine)
    return np.stack([first, np.where(linear, t, np.sin(t * angle) / sine)], axis=-1)


def _cosines(g: np.ndarray, least: float = _TINY) -> np.ndarray:
    """(..., N, N); 0 with vectors of zeros. Products of norms are at least ``least``."""
    import numpy as np

    norms = np.sqrt(np.diagonal(g, axis1=-2, axis2=-1))
    return g / np.maximum(norms[..., :, None] * norms[..., None, :], least)


def _slerp(task: Task, total: Any) -> Apply:
    g = total.numpy()[::-1, ::-1]  # the base, in the last row, is where t = 0
    own, other = _between(g, task.value("t"), _PARALLEL).tolist()
    return blended([other, own])


def _measure_nuslerp(task: Task) -> Measure:
    if task.value("nuslerp_flatten"):
        return (yield from gram(base=task.base))
    by_column = task.value("nuslerp_row_wise")
    return (yield from (measure_columns if by_column else measure_rows)(task))


def _nuslerp(task: Task, found: Any) -> Apply:
    first, second = task.each("weight")

    def between(g: np.ndarray) -> np.ndarray:
        return _between(g, second / (first + second), 1.0)

    if task.value("nuslerp_flatten"):
        return _on_rows(task, between(found.numpy()).tolist())
    by_column = task.value("nuslerp_row_wise")
    return (columns_on_sphere if by_column else rows_on_sphere)(task, found, between)


def _nuslerp_piece(task: Task) -> int:
    if task.value("nuslerp_flatten"):
        return 0
    return BLOCK if task.value("nuslerp_row_wise") else of_band(task)


def _nuslerp_faults(task: Task) -> Iterator[str]:
    yield from _sums_to_zero(task)
    by_column = task.value("nuslerp_row_wise") and not task.value("nuslerp_flatten")
    if by_column and columns(task) > MOST_COLUMNS:
        yield f"nuslerp_row_wise: must have at most {MOST_COLUMNS} columns, got {columns(task)}"


def _mean_on_sphere(
    g: np.ndarray, weights: np.ndarray, steps: int, tolerance: float, *, log: bool
) -> np.ndarray:
    """Coefficients of the unit vector that weighted unit vectors have as their mean.

    ``log``: of the logarithms at the mean, else of projections onto its tangent space.
    """
    import numpy as np

    norms = np.sqrt(np.diagonal(g))
    unit = np.diag(1 / np.where(norms > 0, norms, 1))
    cosines = unit @ g @ unit
    square = weights @ cosines @ weights
    if square <= _CANCELLED * np.abs(weights).sum() ** 2:
        return unit @ weights
    mean = weights / np.sqrt(square)  # over unit vectors
    for _ in range(steps):
        along = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(along)
        scale = np.ones_like(angles)
        if log:
            scale = np.where(angles > _SMALL, angles / np.maximum(np.sin(angles), _SMALL), 1.0)
        step = weights * scale - (weights @ (scale * along)) * mean
        length = float(np.sqrt(max(step @ cosines @ step, 0.0)))
        if length < tolerance:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * step
        mean = mean / np.sqrt(max(mean @ cosines @ mean, 1e-300))
    return unit @ mean


def _multislerp(task: Task, total: Any) -> Apply:
    import numpy as np

    g = total.numpy()
    weights = np.array(task.each("weight"), dtype=float)
    if task.value("normalize_weights"):
        weights = weights / weights.sum()
    norms = np.sqrt(np.diagonal(g))
    mean = _mean_on_sphere(g, weights, 1, task.value("eps"), log=False)
    return _on_rows(task, mean * (weights @ norms))


def _karcher(task: Task, total: Any) -> Apply:
    import numpy as np

    g = total.numpy()
    norms = np.sqrt(np.diagonal(g))
    present = norms > 0
    weights = present / max(present.sum(), 1)
    steps, tolerance = task.value("max_iter"), task.value("tol")
    mean = _mean_on_sphere(g, weights, steps, tolerance, log=True)
    return _on_rows(task, mean * (weights @ norms))


def _measure_model_stock(task: Task) -> Measure:
    by_row = task.value("filter_wise")
    return (yield from (measure_rows(task) if by_row else gram(base=True)))


def _model_stock(task: Task, found: Any) -> Apply:
    if task.value("filter_wise"):
        return rows_on_sphere(task, found, _in_stock)
    return _on_rows(task, _in_stock(found.numpy()).tolist())


def _stock_piece(task: Task) -> int:
    return of_band(task) if task.value("filter_wise") else 0


def _in_stock(g: np.ndarray) -> np.ndarray:
    """Coefficients (..., N) of task vectors: r / N each, 0 where r has no bounds."""
    import numpy as np

    n = g.shape[-1]
    cosines = np.clip(_cosines(g, _LEAST), -1, 1)
    own = np.trace(cosines, axis1=-2, axis2=-1)
    mean = (cosines.sum(axis=(-2, -1)) - own) / (n * (n - 1))
    ends = 1 + (n - 1) * mean
    unbounded = np.abs(ends) < _LEAST
    ratio = np.where(unbounded, 0, mean / np.where(unbounded, 1, ends))
    return np.repeat(ratio[..., None], n, axis=-1)


def _sums_to_zero(task: Task) -> list[str]:
    weights = task.each("weight")
    return [f"weights {weights} sum to zero"] if sum(weights) == 0 else []


_WEIGHT = {"weight": Parameter(None, each=True)}

METHODS = (
    Method(
        "slerp",
        "SLERP",
        "Shoemake, SIGGRAPH 1985",
        _slerp,
        {"t": Parameter(None)},
        _measure_rows,
        base="needed",
        most=1,
    ),
    Method(
        "nuslerp",
        "NuSLERP",
        "Shoemake, SIGGRAPH 1985",
        _nuslerp,
        {
            **_WEIGHT,
            "nuslerp_flatten": Parameter(True, kind=bool),
            "nuslerp_row_wise": Parameter(False, kind=bool),
        },
        _measure_nuslerp,
        base="subtracted",
        fewest=2,
        most=2,
        faults=_nuslerp_faults,
        piece=_nuslerp_piece,
    ),
    Method(
        "multislerp",
        "Multi-SLERP",
        "Goddard, mergekit",
        _multislerp,
        {
            **_WEIGHT,
            "normalize_weights": Parameter(True, kind=bool),
            "eps": Parameter(1e-8, low=0),
        },
        _measure_deltas,
        base="subtracted",
        fewest=2,
        faults=_sums_to_zero,
    ),
    Method(
        "karcher",
        "Karcher mean",
        "Karcher, 1977",
        _karcher,
        {"max_iter": Parameter(10, low=1, kind=int), "tol": Parameter(1e-5, low=0)},
        _measure_deltas,
        fewest=2,
    ),
    Method(
        "model_stock",
        "Model Stock",
        "Jang, Yun, Han, ECCV 2024",
        _model_stock,
        {"filter_wise": Parameter(False, kind=bool)},
        _measure_model_stock,
        base="needed",
        fewest=2,
        piece=_stock_piece,
    ),
)

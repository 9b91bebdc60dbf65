"""mergekit's means on spheres and Model Stock: inner products, then a weighted sum.

As in :mod:`neulig_fast.methods.spherical`, vectors are coefficients over the models, so that
tensors are read twice in all; the rules for what is too short, too near or opposite are mergekit's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...methods import BLOCK
from ...ops import blend_lists_, gram, merge_task_vectors
from .._seam import Unsupported
from .._tensors import check_alike
from ._rows import tiles

_STEP = 16 * BLOCK  # elements: copied and read again from a cache that cores share
_NEAR = 2.0**-22  # squared sines below it are lost in fp32, in which mergekit forms them
_OPPOSITE = 3.14  # an angle from which there is no shortest way back
# Of the squares that were added, whose products in fp32 are right to 1e-7: a mean's below it has no
# direction.
_CANCELLED = 1e-6


def slerp(
    t: Tensor, v0: Tensor, v1: Tensor, dot_threshold: float = 0.9995, eps: float = 1e-8
) -> Tensor:
    """``slerp:slerp``: a pair for each place along the first axis."""
    check_alike([v0, v1])
    if not isinstance(t, Tensor) or not v0.ndim or t.numel() != len(v0):
        raise Unsupported("a t that is not one number for each place along the first axis")
    out = torch.empty_like(v0)
    for share, a, b, merged in zip(t.flatten().tolist(), v0, v1, out, strict=True):
        g = _gram([a, b])
        norms = _norms(g)
        norms[norms <= eps] = 1
        cosine = float(np.clip(g[0, 1] / (norms[0] * norms[1]), -1, 1))
        _blend([a, b], _arc(share, cosine, abs(cosine) > dot_threshold), merged)
    return out


def nuslerp(
    group: Any, weight: Any, nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True
) -> Tensor:
    """``nuslerp``: of two models, or of their task vectors."""
    if not nuslerp_flatten:
        raise Unsupported("rows or columns on their own")
    experts, base = _opened(group)
    weights = weight.values_for(group.non_base)
    total = sum(weights)
    share = 0.5 if abs(total) < 1e-6 else weights[1] / total
    g = _gram(experts, base)
    norms = np.maximum(_norms(g), 1e-7)
    cosine = float(np.clip(g[0, 1] / (norms[0] * norms[1]), -1, 1))
    return _combined(experts, base, _arc(share, cosine, 1 - cosine**2 <= _NEAR))


def _arc(t: float, cosine: float, linear: bool) -> list[float]:
    if linear:
        return [1 - t, t]
    angle = np.arccos(cosine)
    return [float(np.sin(share * angle) / np.sin(angle)) for share in (1 - t, t)]


def multislerp(
    group: Any, weight: Any, normalize_weights: bool = True, eps: float = 1e-8
) -> Tensor:
    """``multislerp``: one step from the weighted mean of unit vectors."""
    experts, base = _opened(group)
    weights = np.array(weight.values_for(group.non_base), dtype=float)
    if len(experts) < 2 or (normalize_weights and not weights.sum()):
        raise Unsupported("nothing to interpolate")
    if normalize_weights:
        weights = weights / weights.sum()
    g = _gram(experts, base)
    norms = _norms(g)
    unit = 1 / (norms + eps)
    cosines = unit[:, None] * g * unit
    mean = weights / _length(weights, cosines)
    along = cosines @ mean
    tangent = weights - (weights @ along) * mean
    length = np.sqrt(max(tangent @ cosines @ tangent, 0.0)) + eps
    found = np.cos(length) * mean + np.sin(length) / length * tangent
    return _combined(experts, base, found * unit * (norms @ weights))


def karcher_merge_tensors(
    tensors: Sequence[Tensor], alphas: Sequence[float], max_iter: int = 10, tol: float = 1e-5
) -> Tensor:
    """``karcher:karcher_merge_tensors``: steps until they are short."""
    check_alike(tensors)
    if not tensors[0].ndim:
        raise Unsupported("scalars, whose type mergekit changes")
    g = _gram(tensors)
    norms, shares = _norms(g), np.array(alphas, dtype=float)
    present = norms > tol
    if len(tensors) < 2 or not present.any() or not shares[present].sum():
        raise Unsupported("nothing to interpolate")
    unit = np.where(present, 1 / np.where(present, norms, 1), 0)
    cosines = unit[:, None] * g * unit
    weights = np.where(present, shares, 0) / shares[present].sum()
    mean = weights / _length(weights, cosines)
    for _ in range(max_iter):
        along = np.clip(cosines @ mean, -1, 1)
        angles = np.arccos(along)
        if (angles[present] > _OPPOSITE).any():
            raise Unsupported("opposite vectors")
        scale = np.where(angles < tol, 0, angles / np.where(angles < tol, 1, np.sin(angles)))
        step = weights * scale - (weights @ (scale * along)) * mean
        length = float(np.sqrt(max(step @ cosines @ step, 0.0)))
        if length < tol:
            break
        mean = np.cos(length) * mean + np.sin(length) / length * step
        mean = mean / np.sqrt(mean @ cosines @ mean)
    return _combined(tensors, None, mean * unit * (shares @ norms))


def model_stock(group: Any, filter_wise: bool = False) -> Tensor:
    """``model_stock``: towards the mean as far as the experts' task vectors point the same way."""
    if filter_wise:
        raise Unsupported("rows on their own")
    experts, base = _opened(group)
    n, g = len(experts), _gram(experts, base)
    norms = _norms(g)
    cosines = np.clip(g / np.maximum(np.outer(norms, norms), 1e-6), -1, 1)
    mean = cosines[np.triu_indices(n, 1)].mean()
    denominator = 1 + (n - 1) * mean
    ratio = 0.0 if abs(denominator) < 1e-6 else n * mean / denominator
    return _combined(experts, base, [ratio / n] * n)


# -- what they have in common ---------------------------------------------------------------------


def _opened(group: Any) -> tuple[list[Tensor], Tensor | None]:
    """The experts' tensors and the base's."""
    check_alike(group.tensors)
    base = None if group.base is None else group.base.tensor
    return [entry.tensor for entry in group.non_base], base


def _gram(tensors: Sequence[Tensor], base: Tensor | None = None) -> np.ndarray:
    """(N, N) inner products of tensors, or of their differences to the base."""
    total = torch.zeros(len(tensors), len(tensors), dtype=torch.float64, device=tensors[0].device)
    for tile in tiles([*tensors] if base is None else [*tensors, base], _STEP):
        rows = tile.rows[: len(tensors)]
        total += gram(rows, None if base is None else tile.rows[-1])[0]
    if not total.isfinite().all():
        raise Unsupported("values that are not finite")
    return total.cpu().numpy()


def _norms(g: np.ndarray) -> np.ndarray:
    return np.sqrt(np.diagonal(g).copy())


def _length(weights: np.ndarray, cosines: np.ndarray) -> float:
    """Of the weighted sum of unit vectors; Unsupported where they nearly cancel."""
    square = float(weights @ cosines @ weights)
    if square <= _CANCELLED * float(np.abs(weights) @ np.abs(cosines) @ np.abs(weights)):
        raise Unsupported("vectors that cancel")
    return float(np.sqrt(square))


def _combined(
    tensors: Sequence[Tensor], base: Tensor | None, coefficients: Sequence[float] | np.ndarray
) -> Tensor:
    """The sum with these coefficients, or the base and the sum of task vectors."""
    out = torch.empty_like(tensors[0])
    if base is None:
        return _blend(tensors, coefficients, out)
    weights = torch.tensor(list(coefficients), dtype=torch.float64, device=out.device)
    for tile in tiles([*tensors, base]):
        part = out.view(-1)[tile.start : tile.start + tile.rows.shape[1]]
        merge_task_vectors(tile.rows[:-1], weights, tile.rows[-1], out=part)
    return out


def _blend(
    tensors: Sequence[Tensor], coefficients: Sequence[float] | np.ndarray, out: Tensor
) -> Tensor:
    weights = torch.tensor(list(coefficients), dtype=torch.float64, device=out.device)
    blend_lists_([out], weights, [[tensor] for tensor in tensors])
    return out

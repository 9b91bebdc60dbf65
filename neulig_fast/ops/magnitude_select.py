"""magnitude_select: which elements of every task vector are its k largest, exactly.

    d_i[p] = params[i, p] - base[p]

    |d_i[p]| > thresholds[i], or |d_i[p]| == thresholds[i] and p < cuts[i]

holds for exactly counts[i] elements: the largest magnitudes, ties going to the smaller index. This
is the trimming of TIES-Merging (arXiv 2306.01708, NeurIPS 2023) and, from both ends, of Model
Breadcrumbs (arXiv 2312.06795), for tensors of any size, without sorting them and without a mask.

NaN has no rank: it is not among the elements that are counted, and ``~(|d| <= threshold)``, the
first condition written so, keeps it. Infinity is a magnitude like others.

Numerics: differences in fp32 (fp64 for fp64); the rest are comparisons. The same bits on every
backend and for every number of threads.

Traffic: N * P values and base read once, where nothing misleads the sample that says where to look.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._registry import Op
from . import _arena, _magnitudes


class MagnitudeSelect(NamedTuple):
    """``thresholds`` (N,) fp32 (fp64 for fp64) and ``cuts`` (N,) int64, one past the last tie."""

    thresholds: Tensor
    cuts: Tensor


def magnitude_select(params: Tensor, counts: Tensor, base: Tensor | None = None) -> MagnitudeSelect:
    """Thresholds that exactly counts[i] elements of each expert's task vector pass.

    Args:
        params: (N, P), one row per expert: fp32, bf16, fp16 or fp64.
        counts: (N,) int64, not negative; what exceeds the number of elements that are not NaN
            means all of them. On a GPU, where values are not looked at, negative ones are zero.
        base: (P,) in params' dtype, what task vectors start from; None is zero.

    Returns:
        A :class:`MagnitudeSelect`. Nothing passes a threshold of infinity with a cut of 0 (a count
        of 0); everything passes -1 (the count of all elements, or more). Not differentiable.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: shapes, dtypes or devices that do not fit, all of them listed; negative counts.
    """
    given = {} if base is None else {"base": base}
    _checks.check_tensors("magnitude_select", params=params, counts=counts, **given)
    return MagnitudeSelect(*OP(params, counts, base))


def _faults(params: Tensor, counts: Tensor, base: Tensor | None = None) -> list[str]:
    return _magnitudes.faults(params, base, counts=counts)


def _check(params: Tensor, counts: Tensor, base: Tensor | None = None) -> None:
    if (counts < 0).any():
        raise ValueError(f"magnitude_select: counts must not be negative, got {counts.tolist()}")


def magnitude_select_reference(
    params: Tensor, counts: Tensor, base: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By sorting every row."""
    thresholds, cuts = _fake(params, counts, base)
    for i, count in enumerate(counts.tolist()):
        thresholds[i], cuts[i] = _one(_magnitudes.magnitudes(params[i], base), count)
    return thresholds, cuts


def _one(d: Tensor, count: int) -> tuple[float | Tensor, int | Tensor]:
    if min(count, d.numel()) <= 0:
        return torch.inf, 0
    unknown = d.isnan()
    if count >= d.numel() - int(unknown.sum()):
        return -1.0, 0
    # Where NaN is sorted to depends on its sign bit in CUDA's sort of fp64.
    values, order = d.masked_fill(unknown, -1).sort(descending=True, stable=True)
    return values[count - 1], order[count - 1] + 1


def _fake(params: Tensor, counts: Tensor, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    acc = _checks.accumulation_dtype(params.dtype)
    return params.new_empty(params.shape[0], dtype=acc), torch.empty_like(counts)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=26)
    yield draw.normal(3, 17), draw.bounds(8, 0, 17), draw.normal(17)
    yield draw.normal(2, 1025)[:, 3:], draw.bounds(1, 700), None
    yield (2 * draw.normal(2, 300)).round() / 2, draw.bounds(60, 299), draw.normal(300).round()
    yield draw.normal(1, 1), draw.bounds(5), draw.normal(1)
    yield draw.normal(2, 0), draw.bounds(0, 3), None
    yield draw.normal(2, 64).zero_(), draw.bounds(20, 63), None


def _prepare(params: Tensor, counts: Tensor, base: Tensor | None = None) -> tuple[Any, ...]:
    return params, counts.contiguous(), base


OP = Op(
    "magnitude_select",
    "(Tensor params, Tensor counts, Tensor? base=None) -> (Tensor thresholds, Tensor cuts)",
    reference=magnitude_select_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "magnitude_select"),
    check=_check,
    elementwise=True,
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", prepare=_prepare, why_not=lambda p, k, b=None: _arena.why_not_with(p, b))
OP.add_triton(prepare=_prepare)

"""gram: inner products of the rows of an arena, or of their differences to a base.

    d_i = params_i - base      params_i where there is no base
    gram[s, i, j] = sum_p d_i[p] d_j[p]      (p over the columns of segment s)

All that spherical interpolation (Shoemake, SIGGRAPH 1985), the Karcher mean and Model Stock (arXiv
2403.19522) have to know of models: a vector is then its coefficients a over the rows, with the
squared norm a' G a.

Numerics: differences are formed before they are multiplied, in fp32 (fp64 for fp64 params), and
short sums of products too, over blocks of columns in a fixed order that never cross a segment;
their totals in fp64. A backend gives the same bits on every run and for every number of threads
(the reference multiplies as BLAS does); backends agree within the tolerance rule.

Traffic: (N + 1) * P values read once. About N * N * P flops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._registry import Op
from . import _arena, _sharded

if TYPE_CHECKING:
    from ..segments import Segments

_BLOCK = 1 << 12  # columns whose products are summed in the accumulation type


def gram(
    params: Tensor,
    base: Tensor | None = None,
    segments: Tensor | Sequence[int] | Segments | None = None,
) -> Tensor:
    """Inner products of N rows, per segment.

    Args:
        params: (N, P), one row per expert: fp32, bf16, fp16 or fp64. Rows may be strided.
        base: (P,) in the dtype of ``params``, subtracted from every row; None for nothing.
        segments: as in :func:`neulig_fast.blend`; None is one segment.

    Returns:
        (S, N, N) in fp64, symmetric. Not differentiable: the experts are frozen.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes or devices that do not fit, all of them listed; a DTensor.
    """
    _checks.check_tensors("gram", params=params, **({} if base is None else {"base": base}))
    if _sharded.is_dtensor(params, *(() if base is None else (base,))):
        raise ValueError("gram: takes plain tensors, got a DTensor")
    return OP(params, base, _arena.boundaries("gram", segments, params))


def _faults(
    params: Tensor, base: Tensor | None = None, segments: Tensor | None = None
) -> list[str]:
    return _arena.faults(params, segments) + _arena.base_faults(params, base)


def gram_reference(
    params: Tensor, base: Tensor | None = None, segments: Tensor | None = None
) -> Tensor:
    """The formula in plain PyTorch, a block of columns at a time."""
    n, width = params.shape
    acc = _checks.accumulation_dtype(params.dtype)
    ranges = [(0, width)] if segments is None else _arena.slices(segments)
    products = params.new_zeros((len(ranges), n, n), dtype=torch.float64)
    for s, (start, stop) in enumerate(ranges):
        for left in range(start, stop, _BLOCK):
            columns = slice(left, min(left + _BLOCK, stop))
            d = params[:, columns].to(acc)
            if base is not None:
                d = d - base[columns].to(acc)
            products[s] += d @ d.T
    return (products + products.mT) / 2  # a BLAS product need not be symmetric to the bit


def _fake(params: Tensor, base: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
    count, n = 1 if segments is None else segments.shape[0] - 1, params.shape[0]
    return params.new_empty((count, n, n), dtype=torch.float64)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=28)
    yield draw.normal(3, 17), None, None
    yield draw.normal(1, 40), draw.normal(40), None
    yield draw.normal(2, 0), None, None
    yield draw.normal(3, 1025)[:, 3:], draw.normal(1022), draw.bounds(0, 0, 77, 1022)
    yield draw.normal(6, 96)[:, 16:80], None, draw.bounds(0, 32, 64)


def _prepare(
    params: Tensor, base: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Any, ...]:
    return params, base, _arena.contiguous(segments)


OP = Op(
    "gram",
    "(Tensor params, Tensor? base=None, Tensor? segments=None) -> Tensor",
    reference=gram_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "gram"),
    check=lambda params, base=None, segments=None: _arena.check_values("gram", params, segments),
    terms=lambda params, base=None, segments=None: max(1, params.shape[1]),
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", prepare=_prepare, why_not=lambda p, b=None, s=None: _arena.why_not_with(p, b))
OP.add_triton(prepare=_prepare)

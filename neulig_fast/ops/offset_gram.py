"""offset_gram: sums and Gram matrix of the experts' offsets from their mean.

    xi_i = theta_i - mean_j theta_j,   sums[s, i] = sum_p xi_i[p],
    gram[s, i, j] = sum_p xi_i[p] * xi_j[p]       (p over the columns of segment s)

From these follow every alignment term of NeuLig (arXiv 2503.01268): the published scalar sums, the
exact weighted-offset constraint w' G w, and the variance of a merge w' D w / 2.

Numerics: offsets are formed before they are multiplied, because centring theta theta' afterwards
loses about six digits when the offsets are small beside the parameters; they are formed from
differences to expert 0, which are exact when experts are close, so equal experts give zeros. The
kernels multiply those differences and centre the totals, which are as small as the offsets, in
fp64; the reference centres first. Columns in fp32 (fp64 for fp64 params) over blocks in a fixed
order, totals in fp64: a backend gives the same bits on every run (the reference multiplies as BLAS
does). Across backends results agree within the tolerance rule.

Traffic: N * P values read once. About N * N * P flops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _checks
from .._registry import Op
from . import _arena, _sharded

if TYPE_CHECKING:
    from ..segments import Segments

# Wide enough to hide the Python loop, small enough that fp32 sums keep their digits and that N
# offset rows of a block are megabytes.
_BLOCK = 1 << 16


def offset_gram(
    params: torch.Tensor, segments: torch.Tensor | Sequence[int] | Segments | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and Gram matrices of the offsets of N experts from their mean, per segment.

    Args:
        params: (N, P), one row per expert: fp32, bf16, fp16 or fp64.
        segments: as in :func:`neulig_fast.blend`; None is one segment.

    Returns:
        sums (S, N) and gram (S, N, N), both fp64. Every row of a Gram matrix sums to zero up to
        rounding. Not differentiable: the experts are frozen.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes or devices that do not fit, all of them listed.
    """
    _checks.check_tensors("offset_gram", params=params)
    if _sharded.is_dtensor(params):
        return _sharded.offset_gram(params, segments)
    return OP(params, _arena.boundaries("offset_gram", segments, params))


def offset_gram_reference(
    params: torch.Tensor, segments: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula in plain PyTorch, a block of columns at a time."""
    n, width = params.shape
    ranges = [(0, width)] if segments is None else _arena.slices(segments)
    sums = params.new_zeros((len(ranges), n), dtype=torch.float64)
    gram = params.new_zeros((len(ranges), n, n), dtype=torch.float64)
    if n == 1:
        return sums, gram  # one expert is its own mean, whatever it holds
    for s, (start, stop) in enumerate(ranges):
        for left in range(start, stop, _BLOCK):
            theta = params[:, left : min(left + _BLOCK, stop)]
            theta = theta.to(_checks.accumulation_dtype(theta.dtype))
            # Differences of near-equal numbers are exact, so the mean is taken of those.
            from_first = theta - theta[0]
            xi = from_first - from_first.mean(0)
            sums[s] += xi.sum(1)
            gram[s] += xi @ xi.T
    return sums, (gram + gram.mT) / 2  # a BLAS product need not be symmetric to the bit


def offset_gram_fake(
    params: torch.Tensor, segments: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    count, n = 1 if segments is None else segments.shape[0] - 1, params.shape[0]
    return (
        params.new_empty((count, n), dtype=torch.float64),
        params.new_empty((count, n, n), dtype=torch.float64),
    )


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=22)
    yield draw.normal(3, 17), None
    yield draw.normal(1, 40), None
    yield draw.normal(2, 0), None
    yield draw.normal(5, 1025)[:, 3:], draw.bounds(0, 0, 77, 1022)
    yield draw.normal(11, 96)[:, 16:80], draw.bounds(0, 32, 32, 33, 64)


def _prepare(params: torch.Tensor, segments: torch.Tensor | None = None) -> tuple[Any, ...]:
    return params, _arena.contiguous(segments)


OP = Op(
    "offset_gram",
    "(Tensor params, Tensor? segments=None) -> (Tensor, Tensor)",
    reference=offset_gram_reference,
    fake=offset_gram_fake,
    faults=_arena.faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "offset_gram"),
    check=lambda params, segments=None: _arena.check_values("offset_gram", params, segments),
    terms=lambda params, segments=None: max(1, params.shape[1]),
)
OP.add_native("cpu", prepare=_prepare, why_not=lambda params, s=None: _arena.why_not(params))
OP.add_native("cuda", prepare=_prepare, why_not=lambda params, s=None: _arena.why_not_cuda(params))
OP.add_triton(prepare=_prepare)

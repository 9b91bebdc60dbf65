"""blend_telemetry: a blend, and what it did to the parameters, in the same pass.

    theta[k, p]     = sum_i weights[k, s(p), i] * params[i, p]                as blend
    xi_i            = theta_i - b       task vectors, relative to row `base` of params or,
    xi_k            = theta_k - b       without one, to the mean b = mean_j theta_j
    expert_norms    ||xi_i||, merged_norms ||xi_k||      per segment; theta_k before rounding
    nonfinite       entries of theta that are NaN or infinite
    saturated       those of them whose sum was finite: too large for theta's dtype
    sign_conflicts  columns where some xi_i > 0 and some xi_i < 0

Relative to their mean, experts that differ always have both signs; with a base, the conflicts are
those of TIES-Merging (arXiv 2306.01708).

Numerics: theta has blend's bits. Offsets are formed before they are squared, in fp32 (fp64 for fp64
params) and with the same bits on every backend, so counts are exact; squares are formed and added
in fp64, in a fixed order per backend. The mean is taken of differences to expert 0, which are exact
when experts are close, so equal experts have task vectors of norm 0.

Traffic: N * P values read once and K * P written once, as blend. About (2 * N * K + 7 * N) * P
flops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .. import _checks
from .._registry import Op
from . import _arena, _rounding, _sharded

if TYPE_CHECKING:
    from ..segments import Segments


class BlendTelemetry(NamedTuple):
    """What a blend did, per segment. Where weights have no K or segments are None, nor has it.

    ``nonfinite`` and ``saturated`` (K, S) int64, ``merged_norms`` (K, S) fp64, ``expert_norms``
    (S, N) fp64 (0 for the base), ``sign_conflicts`` (S,) int64 and ``columns`` (S,) int64, the
    lengths of the segments (an arena's padding counts as the tensor's before it).
    """

    nonfinite: torch.Tensor
    saturated: torch.Tensor
    merged_norms: torch.Tensor
    expert_norms: torch.Tensor
    sign_conflicts: torch.Tensor
    columns: torch.Tensor

    @property
    def sign_conflict_rate(self) -> torch.Tensor:
        """(S,) fp64: the share of columns with a sign conflict; 0 for an empty segment."""
        return self.sign_conflicts.double() / self.columns.clamp(min=1)


def blend_telemetry(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | Sequence[int] | Segments | None = None,
    out_dtype: torch.dtype | None = None,
    base: int | None = None,
) -> tuple[torch.Tensor, BlendTelemetry]:
    """Blend N rows of parameters, and measure the experts and the result on the way.

    Args:
        weights, params, segments: as in :func:`neulig_fast.blend`.
        out_dtype: of the merged parameters: fp32, bf16, fp16 or fp64; None is that of ``params``.
        base: the row of ``params`` that task vectors start from, such as the pre-trained model;
            None is the experts' mean.

    Returns:
        theta (P,) or (K, P), and a :class:`BlendTelemetry`. Not differentiable: where theta's
        gradient is needed, use :func:`neulig_fast.blend`.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes, devices or a base that do not fit, all of them listed.
    """
    _checks.check_tensors("blend_telemetry", weights=weights, params=params)
    if _sharded.is_dtensor(weights, params):
        raise ValueError("blend_telemetry: takes plain tensors, got a DTensor; blend takes those")
    bounds = _arena.boundaries("blend_telemetry", segments, params)
    _rounding.check_types("blend_telemetry", out_dtype)
    if base is not None and not isinstance(base, (int, torch.SymInt)):
        raise TypeError(f"blend_telemetry: base must be None or a row of params, got {base!r}")
    theta, counts, expert_squares, merged_squares, conflicts = OP(
        weights, params, bounds, out_dtype, base
    )
    columns = conflicts.new_full((), params.shape[1]) if bounds is None else bounds.diff()
    norms = merged_squares.sqrt(), expert_squares.sqrt()
    return theta, BlendTelemetry(counts[0], counts[1], *norms, conflicts, columns)


def _faults(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    base: int | None = None,
) -> list[str]:
    found = _arena.faults(params, segments) + _arena.weight_faults(weights, params, segments)
    if out_dtype is not None and out_dtype not in _checks.FLOAT_DTYPES:
        found.append(f"out_dtype must be fp32, bf16, fp16 or fp64, got {out_dtype}")
    if base is not None and params.ndim == 2 and not 0 <= base < params.shape[0]:
        found.append(f"base must be a row of params, 0 to {params.shape[0] - 1}, got {base}")
    return found


Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def blend_telemetry_reference(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    base: int | None = None,
) -> Results:
    """The formulas in plain PyTorch."""
    w = weights.to(_checks.accumulation_dtype(params.dtype))
    out_dtype = out_dtype or params.dtype
    if segments is None:
        return _one_segment(w, params, out_dtype, base)
    results = blend_telemetry_fake(weights, params, segments, out_dtype, base)
    for s, (start, stop) in enumerate(_arena.slices(segments)):
        part = _one_segment(w[..., s, :], params[:, start:stop], out_dtype, base)
        theta, counts, expert_squares, merged_squares, conflicts = results
        theta[..., start:stop] = part[0]
        counts[..., s], expert_squares[s], merged_squares[..., s], conflicts[s] = part[1:]
    return results


def _one_segment(
    w: torch.Tensor, params: torch.Tensor, out_dtype: torch.dtype, base: int | None
) -> Results:
    theta = [row.to(w.dtype) for row in params]
    N, origin = len(theta), theta[base or 0]
    # With a base the offsets are differences to it; without, to expert 0, and then to their mean.
    mean = sum(x - origin for x in theta) * (1 / N) if base is None else torch.zeros_like(origin)
    xi = [x - origin - mean for x in theta]
    above = torch.stack([x > 0 for x in xi]).any(0)
    below = torch.stack([x < 0 for x in xi]).any(0)

    merged = w[..., 0, None] * theta[0]
    for i in range(1, N):
        merged = merged + w[..., i, None] * theta[i]
    rounded = merged.to(out_dtype)
    nonfinite = ~rounded.isfinite()
    return (
        rounded,
        torch.stack([nonfinite.sum(-1), (nonfinite & merged.isfinite()).sum(-1)]),
        torch.stack([x.double().square().sum() for x in xi]),
        (merged - origin - mean).double().square().sum(-1),
        (above & below).sum(),
    )


def blend_telemetry_fake(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    base: int | None = None,
) -> Results:
    outputs = weights.shape[: -1 if segments is None else -2]
    count = () if segments is None else (segments.shape[0] - 1,)
    return (
        params.new_empty((*outputs, params.shape[1]), dtype=out_dtype or params.dtype),
        params.new_empty((2, *outputs, *count), dtype=torch.int64),
        params.new_empty((*count, params.shape[0]), dtype=torch.float64),
        params.new_empty((*outputs, *count), dtype=torch.float64),
        params.new_empty(count, dtype=torch.int64),
    )


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=23)
    yield draw.normal(3), draw.normal(3, 17), None, None, None
    yield draw.normal(2, 5), draw.normal(5, 1025), None, None, 0
    yield draw.normal(1), draw.normal(1, 33), None, torch.bfloat16, None
    yield draw.normal(3), draw.normal(3, 0), None, None, 2
    yield 1e4 * draw.normal(4), draw.normal(4, 300)[:, 7:136], None, torch.float16, 3
    yield draw.normal(3, 2), draw.normal(2, 200), draw.bounds(0, 1, 130, 200), None, None
    yield (
        *(draw.normal(3, 4, 11), draw.normal(11, 96), draw.bounds(0, 32, 32, 65, 96)),
        *(torch.float64, 7),
    )


def _prepare(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    base: int | None = None,
) -> tuple[Any, ...]:
    weights = weights.to(_checks.accumulation_dtype(params.dtype)).contiguous()
    return weights, params, _arena.contiguous(segments), out_dtype or params.dtype, base


OP = Op(
    "blend_telemetry",
    "(Tensor weights, Tensor params, Tensor? segments=None, ScalarType? out_dtype=None, "
    "int? base=None) -> (Tensor theta, Tensor counts, Tensor expert_squares, "
    "Tensor merged_squares, Tensor conflicts)",
    reference=blend_telemetry_reference,
    fake=blend_telemetry_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "blend_telemetry"),
    check=lambda weights, params, segments=None, *_: _arena.check_values(
        "blend_telemetry", params, segments
    ),
    terms=lambda weights, params, *_: max(1, params.shape[1]),
)
OP.add_native("cpu", prepare=_prepare, why_not=lambda w, params, *_: _arena.why_not(params))
OP.add_native("cuda", prepare=_prepare, why_not=lambda w, params, *_: _arena.why_not_cuda(params))
OP.add_triton(prepare=_prepare)

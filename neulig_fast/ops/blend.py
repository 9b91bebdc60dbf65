"""blend: weighted sums of experts' parameters.

    theta[k, p] = sum_i weights[k, s(p), i] * params[i, p]

where s(p) is the segment that column p belongs to. This is the merge step of every linear method:
theta_w = sum_i w_i theta_i (NeuLig, arXiv 2503.01268), model soups, task arithmetic, layer-wise
coefficients.

Numerics: terms are formed and added in expert order, a multiplication and then an addition, in
fp32 (fp64 for fp64 params), and rounded once at the end (_rounding.py says how); every backend,
thread count and tiling gives the same bits. A non-finite parameter passes through even where its
weight is zero.

Traffic: N * P values read once and K * P written once, whatever K. 2 * N * K * P flops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._memory import large_pages
from .._registry import Op
from . import _arena, _rounding, _scales, _sharded

if TYPE_CHECKING:
    from ..segments import Segments

_CONVERTED = 1 << 24  # values that a backward pass converts to another type at once


def blend(
    weights: Tensor,
    params: Tensor,
    segments: Tensor | Sequence[int] | Segments | None = None,
    out_dtype: torch.dtype | None = None,
    rounding_seed: int | None = None,
    *,
    scales: Tensor | None = None,
    out_scales: Tensor | None = None,
) -> Tensor:
    """Blend N rows of parameters into one row, or into K rows with K sets of weights.

    Args:
        weights: (N,) or (K, N); with ``segments`` (S, N) or (K, S, N). Any float dtype.
        params: (N, P), one row per expert: fp32, bf16, fp16, fp64, float8_e4m3fn or float8_e5m2.
            Rows may be strided.
        segments: boundaries of S column ranges, (S + 1,) int64 ascending from 0 to P on the
            device of ``params`` (or a sequence of ints, or ``ExpertPool.segments``).
        out_dtype: any of the types of ``params``; by default that of ``params``. fp8 saturates.
        rounding_seed: None rounds to nearest even; a 64-bit integer rounds stochastically, keyed
            by it: for bf16, fp16 and fp8 results.
        scales: (N,), with ``segments`` also (S, N): a stored value times its scale is the
            parameter.
        out_scales: () or (K,), with ``segments`` (), (S,) or (K, S): a stored result times its
            scale is the merged parameter. Both kinds of scales are folded into the weights.

    Returns:
        (P,) or (K, P). Differentiable in ``weights``, in scales and in ``params`` unless fp8;
        stochastic rounding has the gradient of no rounding.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes or devices that do not fit, all of them listed.
    """
    _checks.check_tensors("blend", weights=weights, params=params)
    bounds = _arena.boundaries("blend", segments, params)
    _rounding.check_types("blend", out_dtype, rounding_seed)
    if scales is not None or out_scales is not None:
        _scales.check_types("blend", scales, out_scales)
        found = blend_faults(weights, params, bounds, out_dtype, rounding_seed)
        found += _scales.faults(weights, params, bounds, scales, out_scales)
        _checks.raise_all("blend", found)
    if _sharded.is_dtensor(weights, params, scales, out_scales):
        return _sharded.blend(weights, params, bounds, out_dtype, rounding_seed, scales, out_scales)
    weights = _scales.fold(weights, params, scales, out_scales)
    return OP(weights, params, bounds, out_dtype, rounding_seed)


def blend_faults(
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rounding_seed: int | None = None,
) -> list[str]:
    found = _arena.faults(params, segments, fp8=True)
    found += _arena.weight_faults(weights, params, segments)
    if out_dtype is not None or rounding_seed is not None:
        found += _rounding.faults(out_dtype or params.dtype, rounding_seed)
    return found


def blend_reference(
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rounding_seed: int | None = None,
) -> Tensor:
    """The formula in plain PyTorch."""
    dtype = out_dtype or params.dtype
    w = weights.to(_checks.accumulation_dtype(params.dtype))
    if segments is None:
        return _rounding.round_to(_weighted_sum(w, params), dtype, rounding_seed, 0)
    pieces = [
        _rounding.round_to(
            _weighted_sum(w[..., s, :], params[:, start:stop]), dtype, rounding_seed, s
        )
        for s, (start, stop) in enumerate(_arena.slices(segments))
    ]
    return torch.cat(pieces, -1) if pieces else params.new_empty((*w.shape[:-2], 0), dtype=dtype)


def _weighted_sum(w: Tensor, theta: Tensor) -> Tensor:
    total = w[..., 0, None] * theta[0].to(w.dtype)
    for i in range(1, theta.shape[0]):
        total = total + w[..., i, None] * theta[i].to(w.dtype)
    return total


def blend_fake(
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rounding_seed: int | None = None,
) -> Tensor:
    leading = weights.shape[: -1 if segments is None else -2]
    return params.new_empty((*leading, params.shape[1]), dtype=out_dtype or params.dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weights, params, segments = ctx.saved_tensors
    # One row of gradient, not N rows of parameters: autograd may hand over an expanded scalar.
    grad = grad.contiguous()
    grad_weights = grad_params = None
    if ctx.needs_input_grad[0]:
        grad_weights = _weight_grad(grad, params, segments).to(weights.dtype)
    if ctx.needs_input_grad[1]:
        if params.dtype in _checks.FP8_DTYPES:
            raise RuntimeError("blend: not differentiable in fp8 params; detach them")
        grad_params = blend_transposed(weights, grad, segments, params.dtype)
    return grad_weights, grad_params, None, None, None


def _weight_grad(grad: Tensor, params: Tensor, segments: Tensor | None) -> Tensor:
    """``blend_weight_grad`` of a gradient whose type need not be that of ``params``.

    The kernels want one type. Where it is another than that of ``params``, some columns of them at
    a time are converted to one that holds both exactly, and their sums are added in fp64.
    """
    op = torch.ops.neulig_fast.blend_weight_grad.default
    common = torch.promote_types(_unpacked(grad.dtype), _unpacked(params.dtype))
    if params.dtype == common:
        return op(grad.to(common), params, segments)
    (experts, columns), total = params.shape, None
    step = max(_CONVERTED // experts, 1)
    for start in range(0, max(columns, 1), step):
        stop = min(start + step, columns)
        bounds = None if segments is None else segments.clamp(start, stop) - start
        part = op(grad[..., start:stop].to(common), params[:, start:stop].to(common), bounds)
        total = part.double() if total is None else total + part
    return total


def _unpacked(dtype: torch.dtype) -> torch.dtype:
    """A type that ordinary kernels read and that holds every value of ``dtype``."""
    return torch.bfloat16 if dtype in _checks.FP8_DTYPES else dtype


def blend_transposed(
    weights: Tensor, rows: Tensor, segments: Tensor | None, dtype: torch.dtype | None = None
) -> Tensor:
    """(N, P) from rows (P,) or (K, P): out[i, p] = sum_k weights[k, s(p), i] * rows[k, p].

    A blend of the K rows with the weights transposed: (N, K) or (N, S, K).
    """
    if rows.ndim == 1:
        weights, rows = weights.unsqueeze(0), rows.unsqueeze(0)
    return torch.ops.neulig_fast.blend.default(
        weights.movedim(0, -1).movedim(-2, 0), rows, segments, dtype
    )


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=20)
    yield draw.normal(3), draw.normal(3, 17), None, None, None
    yield draw.normal(2, 5), draw.normal(5, 1025), None, None, None
    yield draw.normal(1), draw.normal(1, 33), None, None, None
    yield draw.normal(3), draw.normal(3, 0), None, None, None
    yield draw.normal(4), draw.normal(4, 300)[:, 7:136], None, None, None
    yield draw.normal(3, 2), draw.normal(2, 200), draw.bounds(0, 1, 130, 200), None, None
    bounds, other = draw.bounds(0, 32, 32, 65, 96), _arena.other_dtype(dtype)
    yield draw.normal(3, 4, 11), draw.normal(11, 96), bounds, other, None


def _prepare(
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    rounding_seed: int | None = None,
) -> tuple[Any, ...]:
    out = large_pages(blend_fake(weights, params, segments, out_dtype))
    return kernel_arguments(out, weights, params, segments, rounding_seed)


def kernel_arguments(
    out: Tensor,
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    rounding_seed: int | None = None,
) -> tuple[Any, ...]:
    """What the kernels take: weights contiguous in the accumulation type."""
    weights = weights.to(_checks.accumulation_dtype(params.dtype)).contiguous()
    return out, weights, params, _arena.contiguous(segments), rounding_seed


OP = Op(
    "blend",
    "(Tensor weights, Tensor params, Tensor? segments=None, ScalarType? out_dtype=None, "
    "SymInt? rounding_seed=None) -> Tensor",
    native="(Tensor(a!) out, Tensor weights, Tensor params, Tensor? segments=None, "
    "int? rounding_seed=None) -> ()",
    reference=blend_reference,
    fake=blend_fake,
    faults=blend_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "blend"),
    check=lambda weights, params, segments=None, *_: _arena.check_values("blend", params, segments),
    autograd=(_setup_context, _backward),
    differentiable=("weights", "params"),
    elementwise=True,
)
OP.add_native("cpu", prepare=_prepare, why_not=lambda w, params, *_: _arena.why_not(params))
OP.add_native("cuda", prepare=_prepare, why_not=lambda w, params, *_: _arena.why_not_cuda(params))
OP.add_triton(prepare=_prepare)

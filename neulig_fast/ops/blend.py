"""blend: weighted sums of experts' parameters.

    theta[k, p] = sum_i weights[k, s(p), i] * params[i, p]

where s(p) is the segment that column p belongs to. This is the merge step of every linear method:
theta_w = sum_i w_i theta_i (NeuLig, arXiv 2503.01268), model soups, task arithmetic, layer-wise
coefficients.

Numerics: terms are formed and added in expert order, a multiplication and then an addition, in
fp32 (fp64 for fp64 params), and rounded once at the end; every backend, thread count and tiling
gives the same bits. A non-finite parameter passes through even where its weight is zero.

Traffic: N * P values read once and K * P written once, whatever K. 2 * N * K * P flops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _checks
from .._registry import Op
from . import _arena, _sharded

if TYPE_CHECKING:
    from ..segments import Segments

_FORMS = "(N,) or (K, N), with segments (S, N) or (K, S, N)"


def blend(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | Sequence[int] | Segments | None = None,
) -> torch.Tensor:
    """Blend N rows of parameters into one row, or into K rows with K sets of weights.

    Args:
        weights: (N,) or (K, N); with ``segments`` (S, N) or (K, S, N). Any float dtype.
        params: (N, P), one row per expert: fp32, bf16, fp16 or fp64. Rows may be strided.
        segments: boundaries of S column ranges, (S + 1,) int64 ascending from 0 to P on the
            device of ``params`` (or a sequence of ints, or ``ExpertPool.segments``).

    Returns:
        (P,) or (K, P), in the dtype of ``params``. Differentiable in ``weights`` and ``params``.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, all of them listed.
    """
    if _sharded.is_dtensor(weights, params):
        return _sharded.blend(weights, params, segments)
    return OP(weights, params, _arena.boundaries("blend", segments, params))


def _faults(
    weights: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> list[str]:
    found = _arena.faults(params, segments)
    if not weights.is_floating_point():
        found.append(f"weights must be floating point, got {weights.dtype}")
    if weights.device != params.device:
        found.append(f"weights must be on {params.device} like params, got {weights.device}")
    if params.ndim == 2:
        n, s = params.shape[0], 0 if segments is None else segments.numel() - 1
        tail = (n,) if segments is None else (s, n)
        if weights.ndim not in (len(tail), len(tail) + 1) or weights.shape[-len(tail) :] != tail:
            sizes = f"N = {n}" if segments is None else f"N = {n}, S = {s}"
            found.append(f"weights must be {_FORMS}, here {sizes}; got {_checks.shape(weights)}")
    return found


def blend_reference(
    weights: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in plain PyTorch."""
    w = weights.to(_checks.accumulation_dtype(params.dtype))
    if segments is None:
        return _weighted_sum(w, params)
    pieces = [
        _weighted_sum(w[..., s, :], params[:, start:stop])
        for s, (start, stop) in enumerate(_arena.slices(segments))
    ]
    return torch.cat(pieces, -1) if pieces else params.new_empty((*w.shape[:-2], 0))


def _weighted_sum(w: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    total = w[..., 0, None] * theta[0].to(w.dtype)
    for i in range(1, theta.shape[0]):
        total = total + w[..., i, None] * theta[i].to(w.dtype)
    return total.to(theta.dtype)


def blend_fake(
    weights: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> torch.Tensor:
    leading = weights.shape[: -1 if segments is None else -2]
    return params.new_empty((*leading, params.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    weights, params, segments = ctx.saved_tensors
    # One row of gradient, not N rows of parameters: autograd may hand over an expanded scalar.
    grad = grad.contiguous()
    grad_weights = grad_params = None
    if ctx.needs_input_grad[0]:
        op = torch.ops.neulig_fast.blend_weight_grad.default
        grad_weights = op(grad, params, segments).to(weights.dtype)
    if ctx.needs_input_grad[1]:
        grad_params = blend_transposed(weights, grad, segments)
    return grad_weights, grad_params, None


def blend_transposed(
    weights: torch.Tensor, rows: torch.Tensor, segments: torch.Tensor | None
) -> torch.Tensor:
    """(N, P) from rows (P,) or (K, P): out[i, p] = sum_k weights[k, s(p), i] * rows[k, p].

    A blend of the K rows with the weights transposed: (N, K) or (N, S, K).
    """
    if rows.ndim == 1:
        weights, rows = weights.unsqueeze(0), rows.unsqueeze(0)
    return torch.ops.neulig_fast.blend.default(
        weights.movedim(0, -1).movedim(-2, 0), rows, segments
    )


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=20)
    yield draw.normal(3), draw.normal(3, 17), None
    yield draw.normal(2, 5), draw.normal(5, 1025), None
    yield draw.normal(1), draw.normal(1, 33), None
    yield draw.normal(3), draw.normal(3, 0), None
    yield draw.normal(4), draw.normal(4, 300)[:, 7:136], None
    yield draw.normal(3, 2), draw.normal(2, 200), draw.bounds(0, 1, 130, 200)
    yield draw.normal(3, 4, 11), draw.normal(11, 96), draw.bounds(0, 32, 32, 65, 96)


def _prepare(
    weights: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> tuple[Any, ...]:
    weights = weights.to(_checks.accumulation_dtype(params.dtype)).contiguous()
    return weights, params, _arena.contiguous(segments)


OP = Op(
    "blend",
    "(Tensor weights, Tensor params, Tensor? segments=None) -> Tensor",
    reference=blend_reference,
    fake=blend_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    samples=_samples,
    check=lambda weights, params, segments=None: _arena.check_values("blend", params, segments),
    autograd=(_setup_context, _backward),
    differentiable=("weights", "params"),
    elementwise=True,
)
OP.add_native("cpu", prepare=_prepare, why_not=lambda w, params, s=None: _arena.why_not(params))
OP.add_native(
    "cuda", prepare=_prepare, why_not=lambda w, params, s=None: _arena.why_not_cuda(params)
)
OP.add_triton(prepare=_prepare)

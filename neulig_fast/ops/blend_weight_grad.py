"""blend_weight_grad: the gradient of a blend with respect to its weights.

    g[k, s, i] = sum over p in segment s of grad[k, p] * params[i, p]

All N * K dot products of N experts with K incoming rows, per segment. It is also the inner
product of task vectors with a direction (layer-wise merging coefficients, AdaMerging).

Numerics: products in fp32 (fp64 for fp64 params); sums over blocks of columns in a fixed order,
block totals in fp64, so that a backend gives the same bits on every run (the reference sums as
PyTorch does). Across backends results agree within the tolerance rule.

Traffic: (N + K) * P values read once. 2 * N * K * P flops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import _checks
from .._registry import Op
from . import _arena, _sharded
from .blend import blend_transposed

if TYPE_CHECKING:
    from ..segments import Segments


def blend_weight_grad(
    grad: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | Sequence[int] | Segments | None = None,
) -> torch.Tensor:
    """Dot products of every row of ``grad`` with every expert, per segment.

    Args:
        grad: (P,) or (K, P), in the dtype of ``params``.
        params: (N, P), one row per expert: fp32, bf16, fp16 or fp64. Rows may be strided.
        segments: as in :func:`neulig_fast.blend`.

    Returns:
        (N,) or (K, N); with ``segments`` (S, N) or (K, S, N). fp32, or fp64 for fp64 params.
        Differentiable in both arguments.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes or devices that do not fit, all of them listed.
    """
    _checks.check_tensors("blend_weight_grad", grad=grad, params=params)
    if _sharded.is_dtensor(grad, params):
        return _sharded.blend_weight_grad(grad, params, segments)
    return OP(grad, params, _arena.boundaries("blend_weight_grad", segments, params))


def _faults(
    grad: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> list[str]:
    found = _arena.faults(params, segments)
    found += _checks.layout_faults("grad", grad)
    if grad.dtype != params.dtype or grad.device != params.device:
        found.append(
            f"grad must be {params.dtype} on {params.device} like params, "
            f"got {grad.dtype} on {grad.device}"
        )
    if params.ndim == 2 and (grad.ndim not in (1, 2) or grad.shape[-1] != params.shape[1]):
        found.append(
            f"grad must be (P,) or (K, P), here P = {params.shape[1]}; got {_checks.shape(grad)}"
        )
    return found


def blend_weight_grad_reference(
    grad: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> torch.Tensor:
    """The formula in plain PyTorch, one expert at a time."""
    if segments is None:
        return _dots(grad, params)
    pieces = [_dots(grad[..., a:b], params[:, a:b]) for a, b in _arena.slices(segments)]
    if not pieces:
        accumulate = _checks.accumulation_dtype(params.dtype)
        return params.new_empty((*grad.shape[:-1], 0, params.shape[0]), dtype=accumulate)
    return torch.stack(pieces, -2)


def _dots(grad: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    g = grad.to(_checks.accumulation_dtype(theta.dtype))
    return torch.stack([(g * row.to(g.dtype)).sum(-1) for row in theta], -1)


def blend_weight_grad_fake(
    grad: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> torch.Tensor:
    middle = () if segments is None else (segments.shape[0] - 1,)
    accumulate = _checks.accumulation_dtype(params.dtype)
    return params.new_empty((*grad.shape[:-1], *middle, params.shape[0]), dtype=accumulate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_dots: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # The op is bilinear, so both of its derivatives are blends with the incoming gradient.
    grad, params, segments = ctx.saved_tensors
    grad_grad = grad_params = None
    if ctx.needs_input_grad[0]:
        grad_grad = torch.ops.neulig_fast.blend.default(grad_dots, params, segments)
    if ctx.needs_input_grad[1]:
        grad_params = blend_transposed(grad_dots, grad, segments)
    return grad_grad, grad_params, None


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=21)
    yield draw.normal(17), draw.normal(3, 17), None
    yield draw.normal(2, 1025), draw.normal(5, 1025), None
    yield draw.normal(33), draw.normal(1, 33), None
    yield draw.normal(0), draw.normal(3, 0), None
    yield draw.normal(129), draw.normal(4, 300)[:, 7:136], None
    yield draw.normal(200), draw.normal(2, 200), draw.bounds(0, 1, 130, 200)
    yield draw.normal(3, 96), draw.normal(11, 96), draw.bounds(0, 32, 32, 65, 96)


def _prepare(
    grad: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> tuple[Any, ...]:
    return grad, params, _arena.contiguous(segments)


OP = Op(
    "blend_weight_grad",
    "(Tensor grad, Tensor params, Tensor? segments=None) -> Tensor",
    reference=blend_weight_grad_reference,
    fake=blend_weight_grad_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "blend_weight_grad"),
    check=lambda grad, params, segments=None: _arena.check_values(
        "blend_weight_grad", params, segments
    ),
    autograd=(_setup_context, _backward),
    differentiable=("grad", "params"),
    terms=lambda grad, params, segments=None: max(1, params.shape[1]),
)
OP.add_native(
    "cpu",
    prepare=_prepare,
    why_not=lambda grad, params, s=None: _arena.why_not(grad) or _arena.why_not(params),
)
OP.add_native(
    "cuda",
    prepare=_prepare,
    why_not=lambda grad, params, s=None: _arena.why_not(grad) or _arena.why_not_cuda(params),
)
OP.add_triton(prepare=_prepare)

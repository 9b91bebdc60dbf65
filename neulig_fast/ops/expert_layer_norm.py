"""expert_layer_norm: the layer norms of N experts at once, with the residual that precedes them.

    s = x + residual                                   (s = x without one)
    y = (s - mean(s)) / sqrt(var(s) + eps) * g_i + b_i

for the activations of expert i, mean and (biased) variance over the last dimension.

Numerics: s is rounded to x's dtype, as it is handed on; all else in fp32 (fp64 for fp64 x), rounded
once. The variance is the mean of squared deviations: large means do not cancel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._registry import Op
from . import _layer_norm, _layers
from ._arena import Draw


def expert_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The layer norms above.

    Args:
        x: (N, ..., D): fp32, bf16, fp16 or fp64.
        weight, bias: (N, D) in x's dtype, views of an arena as they are; bias may be None.
        residual: like x.

    Returns:
        y, like x; with ``residual`` (y, s). Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, all of them named.
    """
    _checks.check_tensors("expert_layer_norm", x=x, weight=weight)
    rows, beside = _layer_norm.as_rows("expert_layer_norm", x, residual)
    y, s = OP(rows, weight, bias, float(eps), beside)
    return y.view(x.shape) if residual is None else (y.view(x.shape), s.view(x.shape))


def _faults(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> list[str]:
    found = _layer_norm.faults(x, weight, bias, eps, residual)
    if x.ndim and weight.ndim and x.shape[0] != weight.shape[0]:
        found.append(f"x must be of N = {weight.shape[0]} experts, got {x.shape[0]}")
    return found


def expert_layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula, contiguous. Without a residual the second result is empty."""
    acc = _checks.accumulation_dtype(x.dtype)
    s = x if residual is None else x + residual
    shift = None if bias is None else bias[:, None].to(acc)
    y = _layer_norm.normalise(s.to(acc), weight[:, None].to(acc), shift, eps)
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else s.contiguous()


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.eps, residual = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else output[1], weight, bias)


def _backward(ctx: Any, grad_y: Tensor, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
    s, weight, bias = ctx.saved_tensors
    acc = _checks.accumulation_dtype(s.dtype)
    normal, deviation = _layer_norm.normal(s.to(acc), ctx.eps)
    g = grad_y.to(acc)
    dW = (g * normal).sum(1).to(weight.dtype) if ctx.needs_input_grad[1] else None
    db = None if bias is None or not ctx.needs_input_grad[2] else g.sum(1).to(bias.dtype)
    ds = _layer_norm.input_gradient(g * weight[:, None].to(acc), normal, deviation)
    if ctx.has_residual and grad_s is not None:
        ds = ds + grad_s.to(acc)
    ds = ds.to(s.dtype)
    return ds, dW, db, None, ds if ctx.has_residual else None


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = Draw(device, dtype, seed=33)
    yield draw.normal(3, 4, 8), draw.normal(3, 8), draw.normal(3, 8), 1e-5, None
    arena = draw.normal(2, 200)  # rows of an arena: experts far apart
    x, beside = draw.normal(2, 5, 17), draw.normal(2, 5, 17)
    yield x, arena[:, 3:20], arena[:, 100:117], 1e-6, beside
    yield draw.normal(1, 1, 129), draw.normal(1, 129), None, 1e-5, draw.normal(1, 1, 129)
    yield draw.normal(4, 0, 8), draw.normal(4, 8), draw.normal(4, 8), 1e-5, None


def _run_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The twin's arguments: rows contiguous."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y, s = torch.empty_like(x), x.new_empty(0 if residual is None else x.shape)
    torch.ops.neulig_fast_C.expert_layer_norm.default(y, s, x, weight, bias, eps, residual)
    return y, s


OP = Op(
    "expert_layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor? residual=None) -> (Tensor, Tensor)",
    native="(Tensor(a!) y, Tensor(b!) s, Tensor x, Tensor weight, Tensor? bias, float eps, "
    "Tensor? residual=None) -> ()",
    reference=expert_layer_norm_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    autograd=(_setup_context, _backward),
    differentiable=("x", "weight", "bias", "residual"),
    terms=lambda x, *_: x.shape[-1],
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", run=_run_cpu, why_not=_layers.why_not)
OP.add_triton(run=_layers.triton("expert_layer_norm"))

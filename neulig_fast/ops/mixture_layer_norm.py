"""mixture_layer_norm: the layer norm of merged models, another one for every sample.

    s = x + residual                                   (s = x without one)
    y_b = (s_b - mean(s_b)) / sqrt(var(s_b) + eps) * sum_i w_bi g_i + sum_i w_bi b_i

with mean and (biased) variance over the last dimension. An expert whose coefficient is exactly zero
takes no part in that sample.

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


def mixture_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The layer norm above.

    Args:
        x: (B, ..., D): fp32, bf16, fp16 or fp64.
        weight, bias: (N, D) in x's dtype, views of an arena as they are; bias may be None.
        coef: (B, N), or (N,) for one merged model for the whole batch; any float dtype.
        residual: like x.

    Returns:
        y, like x; with ``residual`` (y, s). Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, all of them named.
    """
    _checks.check_tensors("mixture_layer_norm", x=x, weight=weight, coef=coef)
    rows, beside = _layer_norm.as_rows("mixture_layer_norm", x, residual)
    if coef.ndim == 1:
        coef = coef.expand(rows.shape[0], -1)
    y, s = OP(rows, weight, bias, coef, float(eps), beside)
    return y.view(x.shape) if residual is None else (y.view(x.shape), s.view(x.shape))


def _faults(
    x: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, eps: float,
    residual: Tensor | None = None,
) -> list[str]:  # fmt: skip
    found = _layer_norm.faults(x, weight, bias, eps, residual)
    return found + _layers.coef_faults(x, weight, coef)


def mixture_layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula, contiguous. Without a residual the second result is empty."""
    acc = _checks.accumulation_dtype(x.dtype)
    s = x if residual is None else x + residual
    w = coef.to(acc)
    gain = mixed(w, weight.to(acc))[:, None]
    shift = None if bias is None else mixed(w, bias.to(acc))[:, None]
    y = _layer_norm.normalise(s.to(acc), gain, shift, eps)
    return y.to(x.dtype).contiguous(), x.new_empty(0) if residual is None else s.contiguous()


def mixed(w: Tensor, values: Tensor) -> Tensor:
    """(B, D): sum_i w_bi values_i, of coefficients (B, N) and values (N, D)."""
    total = _layers.weighted(w[:, 0, None], values[0].expand(len(w), -1))
    for i in range(1, len(values)):
        total = total + _layers.weighted(w[:, i, None], values[i].expand(len(w), -1))
    return total


def _per_expert(w: Tensor, values: Tensor) -> Tensor:
    """(N, D): sum_b w_bi values_b, of coefficients (B, N) and values (B, D)."""
    return torch.stack([_layers.weighted(w_i[:, None], values).sum(0) for w_i in w.unbind(1)])


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, coef, ctx.eps, residual = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else output[1], weight, bias, coef)


def _backward(ctx: Any, grad_y: Tensor, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
    s, weight, bias, coef = ctx.saved_tensors
    acc = _checks.accumulation_dtype(s.dtype)
    normal, deviation = _layer_norm.normal(s.to(acc), ctx.eps)
    w, g = coef.to(acc), grad_y.to(acc)
    dgain, dshift = (g * normal).sum(1), g.sum(1)  # (B, D)
    dcoef = dgain @ weight.to(acc).T
    if bias is not None:
        dcoef = dcoef + dshift @ bias.to(acc).T
    ds = _layer_norm.input_gradient(g * mixed(w, weight.to(acc))[:, None], normal, deviation)
    if ctx.has_residual and grad_s is not None:
        ds = ds + grad_s.to(acc)
    ds = ds.to(s.dtype)
    _, need_weight, need_bias, *_ = ctx.needs_input_grad
    return (
        ds,
        _per_expert(w, dgain).to(weight.dtype) if need_weight else None,
        _per_expert(w, dshift).to(bias.dtype) if bias is not None and need_bias else None,
        dcoef.to(coef.dtype),
        None,
        ds if ctx.has_residual else None,
    )


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = Draw(device, dtype, seed=34)
    one_hot = torch.eye(3, device=device, dtype=dtype)
    yield draw.normal(2, 4, 8), draw.normal(3, 8), draw.normal(3, 8), draw.normal(2, 3), 1e-5, None
    yield draw.normal(3, 2, 9), draw.normal(3, 9), draw.normal(3, 9), one_hot, 1e-5, None
    arena = draw.normal(2, 200)  # rows of an arena: experts far apart
    x, beside = draw.normal(4, 5, 17), draw.normal(4, 5, 17)
    yield x, arena[:, 3:20], arena[:, 100:117], draw.normal(4, 2), 1e-6, beside
    wide, beside = draw.normal(1, 1, 129), draw.normal(1, 1, 129)
    yield wide, draw.normal(1, 129), None, draw.normal(1, 1), 1e-5, beside
    yield draw.normal(0, 4, 8), draw.normal(4, 8), draw.normal(4, 8), draw.normal(0, 4), 1e-5, None


def _run_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, eps: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The twin's arguments: rows contiguous, coefficients in the accumulation type."""
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y, s = torch.empty_like(x), x.new_empty(0 if residual is None else x.shape)
    w = coef.to(_checks.accumulation_dtype(x.dtype)).contiguous()
    torch.ops.neulig_fast_C.mixture_layer_norm.default(y, s, x, weight, bias, w, eps, residual)
    return y, s


OP = Op(
    "mixture_layer_norm",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor coef, float eps, Tensor? residual=None) "
    "-> (Tensor, Tensor)",
    native="(Tensor(a!) y, Tensor(b!) s, Tensor x, Tensor weight, Tensor? bias, Tensor coef, "
    "float eps, Tensor? residual=None) -> ()",
    reference=mixture_layer_norm_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    autograd=(_setup_context, _backward),
    differentiable=("x", "weight", "bias", "coef", "residual"),
    terms=lambda x, weight, *_: x.shape[-1] * weight.shape[0],
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", run=_run_cpu, why_not=_layers.why_not)
OP.add_triton(run=_layers.triton("mixture_layer_norm"))

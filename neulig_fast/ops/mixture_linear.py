"""mixture_linear: a linear layer of merged models, another one for every sample.

    y_bt = f(sum_i w_bi (W_i x_bt + b_i))            i = 1..N experts, f an activation or nothing

This is the layer of theta_b = sum_i w_bi theta_i applied to sample b, without that merged model
ever existing in memory (NeuLig, arXiv 2503.01268: merging per sample). An expert whose coefficient
is exactly zero takes no part in that sample. Coefficients need not sum to one.

Numerics: sums in fp32 (fp64 for fp64 x), rounded once at the end, after the activation. Whether a
backend mixes weights, W_b = sum_i w_bi W_i, or results is its own choice: both obey the tolerance
rule. Where T is large against N the first is far cheaper: 2 B O I (N + T) flops, else 2 B T N O I.
In C++ a sample's bits do not depend on the other samples of the batch; docs/ops/mixture_linear.md
says what the others promise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._registry import Op
from . import _activation, _layers
from ._arena import Draw


def mixture_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coef: Tensor,
    *,
    activation: str | None = None,
    skip_below: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The layer above for a batch.

    Args:
        x: (B, ..., I): fp32, bf16, fp16 or fp64.
        weight: (N, O, I) in x's dtype; a view of an arena, ``pool.params``, as it is.
        bias: (N, O) or None.
        coef: (B, N), or (N,) for one merged model for the whole batch; any float dtype.
        activation: None, "relu", "gelu", "gelu_tanh" or "quick_gelu".
        skip_below: take coefficients of smaller magnitude for zero, and say what that may cost.

    Returns:
        y (B, ..., O) in x's dtype. Differentiable in all tensors. With ``skip_below`` (y, bound):
        no result of sample b is further than bound[b] from the exact one, roundings apart.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a negative ``skip_below``, all of
            them named.
    """
    _checks.check_tensors("mixture_linear", x=x, weight=weight, coef=coef)
    if x.ndim < 2:
        raise ValueError(f"mixture_linear: x must be (B, ..., I), got {_checks.shape(x)}")
    one = coef.ndim == 1
    B, T, width = x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]
    rows = x.reshape(1, B * T, width) if one else x.reshape(B, T, width)
    coef = coef[None] if one else coef
    if skip_below is None:
        y = OP(rows, weight, bias, coef, activation)
        return y.view(*x.shape[:-1], y.shape[-1])
    found = _faults(rows, weight, bias, coef, activation)
    if not skip_below >= 0:
        found.append(f"skip_below must be zero or positive, got {skip_below}")
    _checks.raise_all("mixture_linear", found)
    small = coef.abs() < skip_below
    y = OP(rows, weight, bias, coef.masked_fill(small, 0), activation)
    bound = _skip_bound(rows, weight, bias, coef.where(small, 0), activation)
    return y.view(*x.shape[:-1], y.shape[-1]), bound.expand(B) if one else bound


@torch.no_grad()
def _skip_bound(
    x: Tensor, weight: Tensor, bias: Tensor | None, skipped: Tensor, activation: str | None
) -> Tensor:
    """(B,): sum_i |skipped_bi| (max_t |x_bt| max_o |W_io| + max_o |b_io|) times the most that the
    activation stretches, with Euclidean lengths of rows."""
    acc = _checks.accumulation_dtype(x.dtype)
    if 0 in (*x.shape, *weight.shape):
        return x.new_zeros(x.shape[0], dtype=acc)
    longest = torch.linalg.vector_norm(x, dim=2, dtype=acc).amax(1, keepdim=True)  # (B, 1)
    most = longest * torch.linalg.vector_norm(weight, dim=2, dtype=acc).amax(1)  # (B, N)
    if bias is not None:
        most = most + bias.abs().amax(1).to(acc)
    share = _layers.weighted(skipped.to(acc).abs(), most)
    return share.sum(1) * _activation.ACTIVATIONS[activation].steepest


def _faults(
    x: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, activation: str | None = None
) -> list[str]:
    found = _layers.weight_faults(x, weight, bias, rank=3)
    if x.ndim != 3:
        found.append(f"x must be (B, T, I), got {_checks.shape(x)}")
    found += _layers.width_faults(x, "I", weight)
    found += _layers.coef_faults(x, weight, coef)
    return found + _activation.faults(activation)


def mixture_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, activation: str | None = None
) -> Tensor:
    """The formula, expert by expert."""
    acc = _checks.accumulation_dtype(x.dtype)
    rows, w = x.to(acc), coef.to(acc)
    y = rows.new_zeros((*x.shape[:2], weight.shape[1]))
    for i in range(weight.shape[0]):
        term = rows @ weight[i].to(acc).T
        if bias is not None:
            term = term + bias[i].to(acc)
        y = y + _layers.weighted(w[:, i, None, None], term)
    return _activation.ACTIVATIONS[activation].function(y).to(x.dtype)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, activation: str | None = None
) -> Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.activation = inputs[4]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """One expert's gradients at a time: dx, dcoef_bi = <g_b, y_bi>, dW_i and db_i."""
    x, weight, bias, coef = ctx.saved_tensors
    acc = _checks.accumulation_dtype(x.dtype)
    rows, w, g = x.to(acc), coef.to(acc), grad.to(acc)
    if ctx.activation is not None:
        pre = torch.ops.neulig_fast.mixture_linear.default(x, weight, bias, coef, None)
        g = _activation.ACTIVATIONS[ctx.activation].backward(g, pre.to(acc))
    need_x, need_weight, need_bias, need_coef = ctx.needs_input_grad[:4]
    dx = torch.zeros_like(rows) if need_x else None
    parts: list[list[Tensor]] = [[], [], []]  # of weight, bias, coef
    for i in range(weight.shape[0]):
        w_i = w[:, i, None, None]
        share = _layers.weighted(w_i, g)
        if need_x or need_coef:
            W = weight[i].to(acc)
            if dx is not None:
                dx = dx + _layers.weighted(w_i, g @ W)
            if need_coef:
                term = rows @ W.T if bias is None else rows @ W.T + bias[i].to(acc)
                parts[2].append((g * term).sum((1, 2)))
        if need_weight:
            own = _layers.taking_part(w_i, rows)
            parts[0].append(share.flatten(0, 1).T @ own.flatten(0, 1))
        if need_bias and bias is not None:
            parts[1].append(share.sum((0, 1)))
    dW, db, dcoef = (
        torch.stack(part, dim) if part else None for part, dim in zip(parts, (0, 0, 1), strict=True)
    )
    found = zip((dx, dW, db, dcoef), ctx.saved_tensors, strict=True)
    return (*(None if d is None else d.to(t.dtype) for d, t in found), None)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = Draw(device, dtype, seed=31)
    one_hot = torch.eye(3, device=device, dtype=dtype)
    yield draw.normal(2, 3, 4), draw.normal(3, 5, 4), draw.normal(3, 5), draw.normal(2, 3), None
    yield draw.normal(3, 1, 17), draw.normal(3, 7, 17), None, one_hot, "gelu"
    arena = draw.normal(2, 700)  # rows of an arena: experts far apart
    weight, bias = arena[:, 16:646].view(2, 35, 18), arena[:, 650:685]
    yield draw.normal(4, 9, 18), weight, bias, draw.normal(4, 2), "quick_gelu"
    yield (
        draw.normal(1, 40, 33),
        draw.normal(4, 19, 33),
        draw.normal(4, 19),
        draw.normal(1, 4),
        "relu",
    )
    yield draw.normal(2, 5, 3), draw.normal(1, 1, 3), None, draw.normal(2, 1), "gelu_tanh"
    yield draw.normal(0, 2, 3), draw.normal(2, 4, 3), draw.normal(2, 4), draw.normal(0, 2), None


def _prepare_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, coef: Tensor, activation: str | None = None
) -> tuple[Any, ...]:
    """The twin's arguments: x and coefficients contiguous in the accumulation type."""
    acc = _checks.accumulation_dtype(x.dtype)
    rows, w = x.to(acc).contiguous(), coef.to(acc).contiguous()
    return _fake(x, weight, bias, coef), rows, weight, bias, w, _activation.index(activation)


OP = Op(
    "mixture_linear",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor coef, str? activation=None) -> Tensor",
    native="(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, Tensor coef, int activation) "
    "-> ()",
    reference=mixture_linear_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    autograd=(_setup_context, _backward),
    differentiable=("x", "weight", "bias", "coef"),
    terms=lambda x, weight, *_: weight.shape[0] * x.shape[2],
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", prepare=_prepare_cpu, why_not=_layers.why_not)
OP.add_triton(run=_layers.triton("mixture_linear"))

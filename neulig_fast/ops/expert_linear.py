"""expert_linear: the linear layers of N experts at once.

    y_ibt = f(W_i x_bt + b_i)       or, for inputs that differ by expert, f(W_i x_ibt + b_i)

with f an activation or nothing. Weights are views of an arena; nothing is stacked or copied.

Numerics: sums in fp32 (fp64 for fp64 x), rounded once at the end, after the activation.
2 N B T I O flops; N O I + N B T O values, and B T I or N B T I, move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._registry import Op
from . import _activation, _layers
from ._arena import Draw


def expert_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """The layers above for a batch.

    Args:
        x: (B, T, I), shared by all experts, or (N, B, T, I): fp32, bf16, fp16 or fp64.
        weight: (N, O, I) in x's dtype; a view of an arena, ``pool.params``, as it is.
        bias: (N, O) or None.
        activation: None, "relu", "gelu", "gelu_tanh" or "quick_gelu".

    Returns:
        (N, B, T, O) in x's dtype. Differentiable in all tensors.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, all of them named.
    """
    _checks.check_tensors("expert_linear", x=x, weight=weight)
    if x.ndim not in (3, 4):
        raise ValueError(
            f"expert_linear: x must be (B, T, I) or (N, B, T, I), got {_checks.shape(x)}"
        )
    B, T, width = x.shape[-3:]
    y = OP(x.reshape(*x.shape[:-3], B * T, width), weight, bias, activation)
    return y.view(y.shape[0], B, T, y.shape[-1])


def _faults(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> list[str]:
    found = _layers.weight_faults(x, weight, bias, rank=3)
    if x.ndim not in (2, 3):
        found.append(f"x must be (R, I) or (N, R, I), got {_checks.shape(x)}")
    elif x.ndim == 3 and weight.ndim and x.shape[0] != weight.shape[0]:
        found.append(f"x must be of N = {weight.shape[0]} experts, got {x.shape[0]}")
    found += _layers.width_faults(x, "I", weight)
    return found + _activation.faults(activation)


def expert_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """The formula, expert by expert, on rows: x (R, I) or (N, R, I) -> (N, R, O)."""
    acc = _checks.accumulation_dtype(x.dtype)
    y = torch.stack(
        [
            torch.nn.functional.linear(
                (x if x.ndim == 2 else x[i]).to(acc),
                weight[i].to(acc),
                None if bias is None else bias[i].to(acc),
            )
            for i in range(weight.shape[0])
        ]
    )
    return _activation.ACTIVATIONS[activation].function(y).to(x.dtype)


def _fake(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    return x.new_empty((weight.shape[0], x.shape[-2], weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.activation = inputs[3]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias = ctx.saved_tensors
    acc = _checks.accumulation_dtype(x.dtype)
    g = grad.to(acc)
    if ctx.activation is not None:
        pre = torch.ops.neulig_fast.expert_linear.default(x, weight, bias, None)
        g = _activation.ACTIVATIONS[ctx.activation].backward(g, pre.to(acc))
    dx = dW = db = None
    if ctx.needs_input_grad[0]:
        dx = g @ weight.to(acc)
        dx = (dx if x.ndim == 3 else dx.sum(0)).to(x.dtype)
    if ctx.needs_input_grad[1]:
        dW = (g.mT @ x.to(acc)).to(weight.dtype)
    if bias is not None and ctx.needs_input_grad[2]:
        db = g.sum(1).to(bias.dtype)
    return dx, dW, db, None


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = Draw(device, dtype, seed=32)
    yield draw.normal(6, 4), draw.normal(3, 5, 4), draw.normal(3, 5), None
    yield draw.normal(3, 1, 17), draw.normal(3, 7, 17), None, "gelu"
    arena = draw.normal(2, 700)  # rows of an arena: experts far apart
    weight, bias = arena[:, 16:646].view(2, 35, 18), arena[:, 650:685]
    yield draw.normal(2, 36, 18), weight, bias, "quick_gelu"
    yield draw.normal(40, 33), draw.normal(4, 19, 33), draw.normal(4, 19), "relu"
    yield draw.normal(1, 10, 3), draw.normal(1, 1, 3), None, "gelu_tanh"
    yield draw.normal(5, 6), draw.normal(2, 3, 6), None, None
    yield draw.normal(0, 3), draw.normal(2, 4, 3), draw.normal(2, 4), None


def _prepare_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> tuple[Any, ...]:
    """The twin's arguments: x contiguous in the accumulation type."""
    rows = x.to(_checks.accumulation_dtype(x.dtype)).contiguous()
    return _fake(x, weight, bias), rows, weight, bias, _activation.index(activation)


OP = Op(
    "expert_linear",
    "(Tensor x, Tensor weight, Tensor? bias=None, str? activation=None) -> Tensor",
    native="(Tensor(a!) y, Tensor x, Tensor weight, Tensor? bias, int activation) -> ()",
    reference=expert_linear_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    autograd=(_setup_context, _backward),
    differentiable=("x", "weight", "bias"),
    terms=lambda x, *_: x.shape[-1],
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", prepare=_prepare_cpu, why_not=_layers.why_not)
OP.add_triton(run=_layers.triton("expert_linear"))

"""Activations that end a linear layer: y = f(pre)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _checks

_QUICK = 1.702


class Activation(NamedTuple):
    """``function(pre)``, ``backward(grad, pre)`` and a bound on |f'|."""

    function: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    steepest: float


def _quick_gelu(pre: Tensor) -> Tensor:
    return pre * torch.sigmoid(_QUICK * pre)


def _quick_gelu_backward(grad: Tensor, pre: Tensor) -> Tensor:
    s = torch.sigmoid(_QUICK * pre)
    return grad * (s + _QUICK * pre * s * (1 - s))


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda pre: F.gelu(pre, approximate=approximate),
        lambda grad, pre: torch.ops.aten.gelu_backward(grad, pre, approximate=approximate),
        1.13,
    )


# The order is that of csrc/cpu/activation.h; kernels/_gemm.py knows the names.
ACTIVATIONS: dict[str | None, Activation] = {
    None: Activation(lambda pre: pre, lambda grad, pre: grad, 1.0),
    "relu": Activation(F.relu, lambda grad, pre: grad * (pre > 0), 1.0),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "quick_gelu": Activation(_quick_gelu, _quick_gelu_backward, 1.1),
}


def index(activation: str | None) -> int:
    """The number by which kernels know an activation."""
    return list(ACTIVATIONS).index(activation)


def faults(activation: str | None) -> list[str]:
    """What is said of an unknown activation."""
    if activation in ACTIVATIONS:
        return []
    known = [name for name in ACTIVATIONS if name]
    hint = _checks.did_you_mean(str(activation), known)
    return [f"activation must be None or one of {', '.join(known)}; got {activation!r}{hint}"]

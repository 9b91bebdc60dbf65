"""What the two layer norms share: rows, checks, the formula and its gradient."""

from __future__ import annotations

import math

from torch import Tensor

from .. import _checks
from . import _layers


def as_rows(op: str, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """x (G, ..., D) and residual as (G, R, D). ValueError for x of fewer than two dimensions."""
    if x.ndim < 2:
        raise ValueError(f"{op}: x must have at least two dimensions, got {_checks.shape(x)}")
    rows = (x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    if residual is None:
        return x.reshape(rows), None
    _checks.check_tensors(op, residual=residual)
    _checks.raise_all(op, _layers.like(residual, "residual", x))
    return x.reshape(rows), residual.reshape(rows)


def faults(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, residual: Tensor | None
) -> list[str]:
    """What is wrong with the arguments that both have."""
    found = _layers.weight_faults(x, weight, bias, rank=2)
    if x.ndim != 3:
        found.append(f"x must be (G, R, D), got {_checks.shape(x)}")
    elif x.shape[2] == 0:
        found.append("x must have D >= 1, got 0")
    found += _layers.width_faults(x, "D", weight)
    if residual is not None:
        found += _layers.like(residual, "residual", x)
    if not eps >= 0:
        found.append(f"eps must be zero or positive, got {eps}")
    return found


def normal(s: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(s - mean) / deviation and deviation = sqrt(var + eps), row by row."""
    centred = s - s.mean(-1, keepdim=True)
    # The mean of large values is rounded like them; that of what is left of them is not.
    centred = centred - centred.mean(-1, keepdim=True)
    deviation = (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred / deviation, deviation


def normalise(s: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    """The normal values times ``gain``, plus ``shift``."""
    y = normal(s, eps)[0] * gain
    return y if shift is None else y + shift


def input_gradient(g: Tensor, normal: Tensor, deviation: Tensor) -> Tensor:
    """Of s, from the gradient ``g`` of the normal values."""
    along = (g * normal).mean(-1, keepdim=True)
    return (g - g.mean(-1, keepdim=True) - normal * along) / deviation

"""mixture_layer_norm on Triton: rows of sample b, normalised, times the mixed gain plus shift."""

from __future__ import annotations

import torch

from . import _layer_norm
from ._launch import require, run


def why_not(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return _layer_norm.why_not(x, weight, bias, coef, residual)


def mixture_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and s; arguments as the op's.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("mixture_layer_norm", why_not(x, weight, bias, coef, eps, residual))
    y, s = _layer_norm.results(x, residual)
    if x.numel() > 0:
        run(x, _layer_norm.launches(x, weight, bias, coef, eps, residual, y, s))
    return y, s

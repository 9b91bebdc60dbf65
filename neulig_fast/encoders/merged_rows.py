"""Rows of merged models, theta_w = sum_i w_i theta_i, in the pool's layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import _checks
from ..ops.blend import blend

if TYPE_CHECKING:
    from ..pool import ExpertPool


def as_input(pool: ExpertPool, images: Tensor) -> Tensor:
    """``images`` on the pool's device, in its dtype when they are floating point."""
    dtype = pool.params.dtype if images.is_floating_point() else images.dtype
    return images.to(pool.params.device, dtype)


def as_weights(pool: ExpertPool, weights: Tensor) -> Tensor:
    """``weights`` on the pool's device, in the type that the pool's sums are formed in."""
    return weights.to(pool.params.device, _checks.accumulation_dtype(pool.params.dtype))


def batchnorms(template: nn.Module | None) -> dict[str, _BatchNorm]:
    """The BatchNorm modules with running statistics, by their name in ``template``."""
    modules = template.named_modules() if template is not None else ()
    return {
        name: module
        for name, module in modules
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def blended_rows(pool: ExpertPool, weights: Tensor, policy: str = "blend") -> Tensor:
    """(K, P) rows, one merged model per row of ``weights`` (K, N). Differentiable in weights.

    ``policy`` ``"mixture_moments"`` gives BatchNorm the variances of the pooled experts.
    """
    weights = as_weights(pool, weights)
    rows = blend(weights, pool.params)
    if policy == "mixture_moments":
        _add_variance_of_means(pool, weights, rows)
    return rows


def _add_variance_of_means(pool: ExpertPool, weights: Tensor, rows: Tensor) -> None:
    """Turn blended variances into mixture variances, in place."""
    for name in batchnorms(pool.template):
        means, variances = (
            slice(segment.start, segment.start + segment.length)
            for segment in (
                pool.segments[pool.segments.index(f"{name}.{kind}")]
                for kind in ("running_mean", "running_var")
            )
        )
        rows[:, variances] += variance_of_means(weights, pool.params[:, means]).to(rows.dtype)


def variance_of_means(weights: Tensor, means: Tensor) -> Tensor:
    """(K, C): the variance of means (N, C) under weights (K, N), in the weights' dtype.

    sum w (var_i + mu_i^2) - mu^2 = sum w var_i + sum w (mu_i - mu)^2 when sum w = 1; the second
    form cannot cancel, and its second sum is this one.
    """
    experts = means.to(weights.dtype)
    offsets = experts - (weights @ experts)[:, None]
    return (weights[..., None] * offsets.square()).sum(1)

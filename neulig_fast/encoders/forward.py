"""expert_forward and mixture_forward: a batch through N experts, or through merged models."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..pool import ExpertPool
from . import rules, torch_func
from .expert_run import ExpertRun
from .merged_rows import as_input, as_weights, blended_rows
from .mixture_run import MixtureRun
from .runs import Run, stack_of

POLICIES = ("blend", "mixture_moments")
FALLBACKS = (None, "torch.func")

log = logging.getLogger("neulig_fast.dispatch")


def expert_forward(pool: ExpertPool, images: Tensor, *, fallback: str | None = None) -> Tensor:
    """Features of a batch under every expert, in one pass over the template.

    Always in eval mode, whatever mode the template is in, and without autocast: the pool's dtype is
    the type of the arithmetic. The template is read, not changed, except that ``fallback`` sets the
    modes of its submodules for the time it runs.

    Args:
        pool: an :class:`ExpertPool` with a template.
        images: (B, ...), whatever the template takes; floating point is cast to the pool's dtype.
        fallback: None, or ``"torch.func"`` to run templates that no rule covers as before: one
            expert after the other.

    Returns:
        (N, B, D) in the pool's dtype, on its device. Where the template returns a tuple (pooled,
        tokens), the first entry counts. It takes the activations of N * B images at a time.

    Raises:
        ValueError: a pool without template; a module that no rule covers, each named with its path
            and type; images that do not fit; a template that does not map them to (B, D).
        TypeError: a pool that is no pool, images that are no tensor.
    """
    _check_types("expert_forward", pool, images=images)
    template = _template("expert_forward", pool, images, fallback, [])
    images = as_input(pool, images)
    with torch.autocast(images.device.type, enabled=False):
        if not _covered("expert_forward", template, fallback):
            return torch_func.expert_features(pool, template, images)
        run = ExpertRun(functools.partial(stack_of, pool), pool.num_experts, len(images))
        features = _features(run, template, images)
    return features.view(pool.num_experts, len(images), features.shape[1])


def mixture_forward(
    pool: ExpertPool,
    images: Tensor,
    coef: Tensor,
    *,
    batchnorm: str = "blend",
    fallback: str | None = None,
) -> Tensor:
    """Features of a batch under merged models theta_b = sum_i coef[b, i] theta_i, one per image.

    No merged model is held as a whole; an image's features do not depend on the other images.
    Modes, autocast and the template are as in :func:`expert_forward`.

    Args:
        pool, images, fallback: as in :func:`expert_forward`; ``"torch.func"`` blends merged models
            a few at a time and runs them by ``vmap``.
        coef: (B, N), any float dtype; they need not sum to one. Or (N,), one merged model for all
            images: it is blended once; a template that no rule covers runs on it as it is.
        batchnorm: ``"blend"``: statistics are blended like any tensor. ``"mixture_moments"``: the
            variance is that of the experts pooled with these weights.

    Returns:
        (B, D) in the pool's dtype, on its device. Differentiable in ``coef`` (and ``images``).

    Raises:
        ValueError: as :func:`expert_forward`; coefficients of another shape; an unknown policy.
        TypeError: a pool that is no pool, images or coefficients that are no tensor.
    """
    _check_types("mixture_forward", pool, images=images, coef=coef)
    found = _mixture_faults(pool, images, coef, batchnorm)
    template = _template("mixture_forward", pool, images, fallback, found)
    images = as_input(pool, images)
    with torch.autocast(images.device.type, enabled=False):
        if coef.ndim == 1:
            return _merged_features(pool, template, images, coef, batchnorm)
        if not _covered("mixture_forward", template, fallback):
            return torch_func.mixture_features(pool, template, images, coef, batchnorm)
        run = MixtureRun(functools.partial(stack_of, pool), as_weights(pool, coef), batchnorm)
        return _features(run, template, images)


def _merged_features(
    pool: ExpertPool, template: nn.Module, images: Tensor, coef: Tensor, batchnorm: str
) -> Tensor:
    """(B, D) of one merged model, which is a single expert."""
    (row,) = blended_rows(pool, coef[None], batchnorm)
    state = pool.row_state_dict(row)
    if rules.faults(template):
        return torch_func.state_features(template, state, images)
    return _features(ExpertRun(lambda name: state[name][None], 1, len(images)), template, images)


def _check_types(subject: str, pool: Any, **tensors: object) -> None:
    if not isinstance(pool, ExpertPool):
        raise TypeError(f"{subject}: pool must be an ExpertPool, got {type(pool).__name__}")
    _checks.check_tensors(subject, **tensors)


def _template(
    subject: str, pool: ExpertPool, images: Tensor, fallback: str | None, found: list[str]
) -> nn.Module:
    """The pool's template, all arguments being right; ``found``: what else is wrong with them."""
    if not images.ndim:
        found.append("images must be a batch (B, ...), got ()")
    if fallback not in FALLBACKS:
        found.append(f"fallback must be None or 'torch.func', got {fallback!r}")
    if pool.template is None:
        found.append("the pool has no template module to run; give ExpertPool a template=")
    _checks.raise_all(subject, found)
    return pool.template


def _mixture_faults(pool: ExpertPool, images: Tensor, coef: Tensor, batchnorm: str) -> list[str]:
    found = []
    N = pool.num_experts
    B = len(images) if images.ndim else 0
    if tuple(coef.shape) not in ((B, N), (N,)) or not coef.is_floating_point():
        found.append(
            f"coef must be a float tensor (B, N) = ({B}, {N}) or (N,) = ({N},), "
            f"got {_checks.shape(coef)} {coef.dtype}"
        )
    if batchnorm not in POLICIES:
        hint = _checks.did_you_mean(str(batchnorm), POLICIES)
        found.append(f"batchnorm must be one of {', '.join(POLICIES)}; got {batchnorm!r}{hint}")
    return found


def _covered(subject: str, template: nn.Module, fallback: str | None) -> bool:
    """Whether the rules cover the template; ValueError when they do not and nothing else may."""
    found = rules.faults(template)
    if found and fallback is None:
        advice = (
            f"{subject}: no rule covers this template (write one with neulig_fast.encoders."
            "register, or pass fallback='torch.func' for the slow way)"
        )
        _checks.raise_all(advice, found)
    for fault in found:
        log.debug("%s: torch.func, because %s", subject, fault)
    return not found


def _features(run: Run, template: nn.Module, images: Tensor) -> Tensor:
    """(rows, D) of the template."""
    features = run.to_rows(run.apply(template, "", images))
    if features.ndim != 2 or features.shape[0] != run.rows:
        raise ValueError(
            f"features: the encoder must map {_checks.shape(images)} to ({len(images)}, D), "
            f"got {_checks.shape((len(images), *features.shape[1:]))}"
        )
    return features

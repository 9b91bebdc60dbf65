"""Running merged models: one for a whole batch, or exactly one per image.

A merged model is a row of the pool's layout, theta_w = sum_i w_i theta_i.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..encoders import faults, mixture_forward, torch_func
from ..encoders.merged_rows import as_input
from ..encoders.template import run
from . import batchnorm as bn

if TYPE_CHECKING:
    from ..pool import ExpertPool


def state_features(
    pool: ExpertPool, state: Mapping[str, Tensor], images: Tensor, batchnorm: str = "blend"
) -> Tensor:
    """(B, D) features of one merged model."""
    template = runnable(pool)
    with bn.inference(pool, batchnorm):
        return run(template, state, as_input(pool, images))


def runnable(pool: ExpertPool) -> nn.Module:
    """The pool's template. ValueError when it has none: there is no code to run."""
    if pool.template is None:
        raise ValueError(
            "merged models: the pool has no template module to run; give ExpertPool or "
            "NeuLig.load a template="
        )
    return pool.template


def per_sample_features(
    pool: ExpertPool,
    images: Tensor,
    coopvec: Tensor,
    batchnorm: str = "blend",
    chunk: int | None = None,
) -> Tensor:
    """(B, D): image b through its own merged model sum_i coopvec[b, i] theta_i. Exact.

    ``chunk``: merged models that are held at a time where no rule of :mod:`neulig_fast.encoders`
    covers the encoder; where rules do, none is.

    Raises:
        ValueError: an encoder that neither rules nor vmap can run.
    """
    template = runnable(pool)
    if not bn.batchnorms(template):
        batchnorm = "blend"  # all policies are the same then, also those impossible per sample
    if not faults(template):
        return mixture_forward(pool, images, coopvec, batchnorm=batchnorm)
    images = as_input(pool, images)
    return torch_func.mixture_features(pool, template, images, coopvec, batchnorm, chunk)


def chunk_faults(chunk: Any) -> list[str]:
    """What is wrong with a ``chunk`` that a caller gave."""
    if chunk is None or (isinstance(chunk, int) and chunk >= 1):
        return []
    return [f"chunk must be a positive integer or None, got {chunk!r}"]

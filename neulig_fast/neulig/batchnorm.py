"""What a merged model does with BatchNorm and other buffers (docs/neulig.md, 7).

Running statistics are not parameters of a smooth loss, so blending them linearly is one choice
among four:

=====================  ==========================================================================
policy                 running statistics of the merged model
=====================  ==========================================================================
``blend``              mu = sum w_i mu_i and var = sum w_i var_i, like any other tensor
``mixture_moments``    mu as above, var = sum w_i (var_i + mu_i^2) - mu^2: the moments of the
                       experts' activations pooled with weights w. Not those of the merged network
``re_estimate``        measured by running calibration images through the merged model. Batches
                       count by their size; a batch's variance is the unbiased one, and the spread
                       between batch means is not part of it, as in training
``batch_statistics``   none: every batch is normalised by its own statistics at inference
=====================  ==========================================================================

The last two need many images per merged model and are refused where every image has its own.
Models without BatchNorm are the same under all four. Scale and shift are parameters and always
blended. Other float buffers are blended linearly; integer buffers (``num_batches_tracked``) come
from expert 0 and never enter a sum, except that ``re_estimate`` counts its own batches. The mode
``hard``, an expert as it is, keeps the expert's statistics under every policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import _checks
from ..encoders.merged_rows import as_input, batchnorms, blended_rows
from ..encoders.template import call, evaluating

if TYPE_CHECKING:
    from ..pool import ExpertPool

POLICIES = ("blend", "mixture_moments", "re_estimate", "batch_statistics")


def policy_faults(
    pool: ExpertPool, policy: str, *, per_sample: bool = False, calibrated: bool = True
) -> list[str]:
    """What keeps ``policy`` from being used on this pool; empty when nothing does."""
    if policy not in POLICIES:
        hint = _checks.did_you_mean(policy, POLICIES)
        return [f"batchnorm must be one of {', '.join(POLICIES)}; got {policy!r}{hint}"]
    if policy != "blend" and pool.template is None:
        return [f"batchnorm={policy!r} needs the pool's template module, and it has none"]
    if policy in ("blend", "mixture_moments") or not batchnorms(pool.template):
        return []
    if per_sample:
        return [
            f"batchnorm={policy!r} is impossible per sample: every image has a merged model of its "
            "own, and statistics need many images; use 'blend' or 'mixture_moments'"
        ]
    if policy == "re_estimate" and not calibrated:
        return ["batchnorm='re_estimate' needs calibration images: pass calibration="]
    return []


def merged_state_dict(
    pool: ExpertPool,
    weights: Tensor,
    policy: str = "blend",
    calibration: Iterable[Any] | None = None,
) -> dict[str, Tensor]:
    """State dict of theta_w = sum_i w_i theta_i with BatchNorm treated by ``policy``.

    Args:
        weights: (N,), any float dtype.
        calibration: batches of images, or (images, ...) tuples; read by ``re_estimate`` only.

    Returns:
        Views of one new row of the pool's layout, in the pool's dtype.

    Raises:
        ValueError: an unknown or impossible policy.
    """
    faults = policy_faults(pool, policy, calibrated=calibration is not None)
    _checks.raise_all("merge", faults)
    row = blended_rows(pool, weights[None], policy)[0]
    state = pool.row_state_dict(row)
    if policy == "re_estimate" and batchnorms(pool.template):
        batches = (as_input(pool, images_of(batch)) for batch in calibration or ())
        re_estimate(pool.template, state, batches)
    return state


@torch.no_grad()
def re_estimate(template: nn.Module, state: dict[str, Tensor], batches: Iterable[Tensor]) -> None:
    """Replace the running statistics in ``state`` by the merged model's own, in place.

    Args:
        batches: of images, in the state's dtype and on its device.

    Raises:
        ValueError: no batches.
    """
    modules = batchnorms(template)
    for name in modules:
        counter = f"{name}.num_batches_tracked"
        if counter in state:
            state[counter].zero_()
    seen = 0
    settings = {"training": True, "track_running_stats": True, "momentum": 1.0}
    with evaluating(template), _attributes(modules.values(), **settings):
        for images in batches:
            seen += images.shape[0]
            for module in modules.values():
                module.momentum = images.shape[0] / max(seen, 1)
            call(template, state, images)
    if not seen:
        raise ValueError("merge: the calibration loader yields no images to re-estimate from")


@contextlib.contextmanager
def inference(pool: ExpertPool, policy: str) -> Iterator[None]:
    """Eval mode for a block, but BatchNorm as ``policy`` says. Not for concurrent threads."""
    own = batchnorms(pool.template).values() if policy == "batch_statistics" else ()
    settings = {"training": True, "track_running_stats": False}
    with evaluating(pool.template), _attributes(own, **settings):
        yield


@contextlib.contextmanager
def _attributes(modules: Iterable[nn.Module], **values: Any) -> Iterator[None]:
    """Set attributes of modules for a block and restore them whatever happens."""
    modules = list(modules)
    saved = [{name: getattr(module, name) for name in values} for module in modules]

    def apply(settings: Iterable[Mapping[str, Any]]) -> None:
        for module, setting in zip(modules, settings, strict=True):
            for name, value in setting.items():
                setattr(module, name, value)

    try:
        apply([values] * len(modules))
        yield
    finally:
        apply(saved)


def images_of(batch: Any) -> Tensor:
    """The images of a loader's batch: the batch itself, or its first item."""
    return batch if isinstance(batch, Tensor) else batch[0]

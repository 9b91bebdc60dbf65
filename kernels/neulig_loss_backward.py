"""neulig_loss_backward on Triton: the Portland's gradients in six launches.

    ensemble, classes   as in neulig_loss, from the CoopVec of the forward pass, but logits are kept
    slope      per sample: ∂L_b/∂y in their place
    pull       per samples and columns: H' ∂y, and its products with the experts' features
    portland   per sample: the gradient q of the CoopVec, and ∂a of the Portland's logits
    products   per columns of u: ∂W = Σ_b ∂a_b u_b' and ∂c; with ∂y and ê instead, ∂H and ∂h

∂y (B, C) is the one thing of the logits' size that is kept: its sums over classes and over samples
need it in two orders. A sum over the batch is one program's, samples in order; no atomics.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _portland
from ._launch import Config, Launch, config, require, run, tl, triton
from ._logits import classes_launch, ensemble_launch, joined, scratch, tiles_at_once
from ._loss_gradients import Inputs, incoming, portland_launches, product_launch
from ._portland import ENTROPY_EPSILON

why_not = _portland.why_not


@triton.jit
def probabilities(logits_ptr, b, c, B, C, top, total):
    """p = softmax(y) of the samples ``b`` and the classes ``c``, 0 beyond the last one."""
    real = (b < B)[:, None] & (c < C)[None, :]
    place = b[:, None] * C + c[None, :]
    y = tl.load(logits_ptr + place, mask=real, other=-float("inf"))
    return tl.exp(y - top[:, None]) / total[:, None], place, real


@triton.jit(do_not_specialize=["B", "C", "tiles"])
def neulig_loss_slope_kernel(
    logits_ptr, parts_ptr, labels_ptr, loss_ptr, boosting_ptr, B, C, tiles,
    SAMPLES: tl.constexpr, TILES: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """logits (B, C) of SAMPLES samples become k_b ∂L_b/∂y.

    parts (2 or 3, tiles, B) of the classes kernel; labels (B,) int64, None for the entropy; loss
    and boosting: the incoming gradients, scalars or None. A label that is no class makes NaN.
    Reads C values per sample and writes them; for the entropy, reads them twice.
    """
    ACC: tl.constexpr = logits_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    top, total = joined(parts_ptr, b, tiles, B, SAMPLES, TILES)
    along = tl.zeros((SAMPLES,), ACC)
    if labels_ptr is None:
        first = C * 0
        while first < C:
            c = first + tl.arange(0, CLASSES)
            p, _, _ = probabilities(logits_ptr, b, c, B, C, top, total)
            g = tl.log(p + ENTROPY_EPSILON) + p / (p + ENTROPY_EPSILON)
            along -= tl.sum(p * g, 1)
            first += CLASSES
    else:
        label = tl.load(labels_ptr + b, mask=b < B, other=-1)
        known = tl.where((label >= 0) & (label < C), 0.0, float("nan")).to(ACC)
    scale = incoming(loss_ptr, boosting_ptr, ACC) / B.to(ACC)
    first = C * 0
    while first < C:
        c = first + tl.arange(0, CLASSES)
        p, place, real = probabilities(logits_ptr, b, c, B, C, top, total)
        if labels_ptr is None:
            g = -(tl.log(p + ENTROPY_EPSILON) + p / (p + ENTROPY_EPSILON))
            slope = p * (g - along[:, None])
        else:
            slope = tl.where(c[None, :] == label[:, None], p - 1, p) + known[:, None]
        tl.store(logits_ptr + place, slope * scale[:, None], mask=real)
        first += CLASSES


def plan(
    x: Inputs, scaling: float, normalize: bool, centered: bool, needs: Sequence[bool],
    launch: Config,
) -> tuple[list[torch.Tensor | None], list[Launch]]:  # fmt: skip
    """The gradients but that of the alignment, and what fills them, in order.

    A weight's gradient and its bias's come together; None where neither is needed.
    """
    (B, N, D), C, w = x.features.shape, x.head_weight.shape[0], x.coopvec
    portland, head = needs[1] or needs[2], needs[3] or needs[4]
    wanted = (needs[0], portland, portland, head, head)
    shapes = ((B, N, D), (N, N * D), (N,), (C, D), (C,))
    gradients = [w.new_empty(s) if need else None for s, need in zip(shapes, wanted, strict=True)]
    kept = scratch(w, x.head_weight, x.targets is not None, normalize)
    along, slope = torch.empty_like(w) if normalize else None, w.new_empty(B, C)
    tiles, (loss, boosting, *_) = kept.parts.shape[1], x.grads
    arguments = (slope, kept.parts, x.targets, loss, boosting, B, C, tiles)
    options = {"SAMPLES": launch.held, "TILES": tiles_at_once(tiles), "CLASSES": 256}
    found = [
        ensemble_launch(x.features, (None, None), x.alignment, w, along, kept, launch),
        classes_launch(x.head_weight, x.head_bias, x.targets, slope, kept),
        Launch(neulig_loss_slope_kernel, -(-B // launch.held), arguments, options),
    ]
    if gradients[3] is not None and gradients[4] is not None:
        found.append(product_launch(slope, kept.ensemble, kept.norm, *gradients[3:]))
    if needs[0] or portland:
        settings = (scaling, centered, launch)
        found += portland_launches(x, kept, along, slope, gradients[:3], *settings)
    return gradients, found


def neulig_loss_backward(
    grad_loss: torch.Tensor | None,
    grad_boosting: torch.Tensor | None,
    grad_alignment: torch.Tensor | None,
    grad_coopvec: torch.Tensor | None,
    coopvec: torch.Tensor,
    features: torch.Tensor,
    portland_weight: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    alignment: torch.Tensor,
    boosting: str,
    scaling: float,
    normalize: bool,
    centered: bool,
    needs: list[bool],
) -> tuple[torch.Tensor, ...]:
    """The six gradients; arguments as the op's.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("neulig_loss_backward", why_not(features, portland_weight, head_weight))
    w, labels = coopvec.contiguous(), targets if boosting == "supervised" else None
    small = [None if t is None else t.contiguous() for t in (grad_coopvec, head_bias, labels)]
    grads = (grad_loss, grad_boosting, grad_alignment, small[0])
    A = alignment.contiguous()
    inputs = Inputs(grads, w, features, portland_weight, head_weight, *small[1:], A)
    launch = config("neulig_loss_backward", features.dtype, features.shape[1], 1)
    gradients, found = plan(inputs, scaling, normalize, centered, needs, launch)
    if any(needs[:5]):
        run(features, found)
    gradients.append(alignment_gradient(grads, w, scaling, centered) if needs[5] else None)
    return tuple(
        g if need and g is not None else w.new_empty(0)
        for g, need in zip(gradients, needs, strict=True)
    )


def alignment_gradient(
    grads: Sequence[torch.Tensor | None], w: torch.Tensor, scaling: float, centered: bool
) -> torch.Tensor:
    """k_a Σ_b v_b v_b' / (λB): a few numbers, rarely asked for, and PyTorch's product of them."""
    total = sum((g for g in (grads[0], grads[2]) if g is not None), w.new_zeros(()))
    v = w - w.mean(0) if centered else w
    return total / (scaling * len(w)) * (v.T @ v)

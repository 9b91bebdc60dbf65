"""neulig_loss on Triton: the loss of one batch in three launches, four for the entropy.

    ensemble   per sample: Portland, CoopVec w, e = Σ_i w_i z_i and ‖e‖; (A + A') w
    classes    per tile of samples and classes: logits, their maximum and their sum of exponentials
    entropy    per tile once more: -Σ_c p log(p + δ), which needs the whole softmax's p
    total      the three scalars

Logits stay in registers: what a tile leaves is two numbers per sample, which the last launch joins
as an online softmax does. One launch for all would leave a batch of 128 on a few programs, and each
of them with the whole head to read. No atomics: every sum is one program's, in a fixed order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import _portland
from ._launch import Config, Launch, config, require, run, tl, triton
from ._logits import (
    SAMPLES,
    TILE_OPTIONS,
    Scratch,
    classes_launch,
    ensemble_launch,
    joined,
    scratch,
    tile_logits,
    tiles_at_once,
)
from ._portland import ENTROPY_EPSILON, mean_row

why_not = _portland.why_not


@triton.jit(do_not_specialize=["B", "C", "tiles"])
def neulig_loss_entropy_kernel(
    ensemble_ptr, norm_ptr, head_ptr, bias_ptr, parts_ptr, B, C, tiles, D: tl.constexpr,
    SAMPLES: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """-Σ_c p log(p + δ) of a tile's classes, per sample, into parts (3, tiles, B)[2].

    Arguments as of the classes kernel, whose parts this one joins to p = softmax(y).
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // tiles * SAMPLES + tl.arange(0, SAMPLES)
    tile = program % tiles
    c = tile * CLASSES + tl.arange(0, CLASSES)
    top, total = joined(parts_ptr, b, tiles, B, SAMPLES, TILES)
    y = tile_logits(
        ensemble_ptr, norm_ptr, head_ptr, bias_ptr, b, c, B, C, D, SAMPLES, CLASSES, COLUMNS
    )
    p = tl.exp(y - top[:, None]) / total[:, None]
    entropy = -tl.sum(p * tl.log(p + ENTROPY_EPSILON), 1)
    tl.store(parts_ptr + (2 * tiles + tile) * B + b, entropy, mask=b < B)


@triton.jit(do_not_specialize=["B", "tiles"])
def neulig_loss_total_kernel(
    parts_ptr, target_ptr, coopvec_ptr, steered_ptr, loss_ptr, boosting_ptr, alignment_ptr, B,
    tiles, N: tl.constexpr, EXPERTS: tl.constexpr, SAMPLES: tl.constexpr, TILES: tl.constexpr,
    SCALING: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """The scalars L_b + L_a, L_b and L_a. One program; arguments as of the other kernels.

    target None: the entropy. Reads B * (2 or 1) * tiles and 2 * B * N values.
    """
    ACC: tl.constexpr = loss_ptr.dtype.element_ty
    boosting = tl.zeros((SAMPLES,), ACC)
    alignment = tl.zeros((SAMPLES,), ACC)
    mean = tl.zeros((1, EXPERTS), ACC)
    steered_mean = tl.zeros((1, EXPERTS), ACC)
    if CENTERED:
        mean += mean_row(coopvec_ptr, B, N, EXPERTS, SAMPLES)
        steered_mean += mean_row(steered_ptr, B, N, EXPERTS, SAMPLES)
    i = tl.arange(0, EXPERTS)[None, :]
    first = B * 0
    while first < B:
        b = first + tl.arange(0, SAMPLES)
        used = b < B
        if target_ptr is None:
            part = tiles * 0
            while part < tiles:
                tile = part + tl.arange(0, TILES)[None, :].to(tl.int64)
                real = used[:, None] & (tile < tiles)
                place = (2 * tiles + tile) * B + b[:, None]
                boosting += tl.sum(tl.load(parts_ptr + place, mask=real, other=0.0), 1)
                part += TILES
        else:
            top, total = joined(parts_ptr, b, tiles, B, SAMPLES, TILES)
            target = tl.load(target_ptr + b, mask=used, other=0.0)
            boosting += tl.where(used, top - target + tl.log(total), 0.0)
        place = b[:, None] * N + i
        real = used[:, None] & (i < N)
        v = tl.load(coopvec_ptr + place, mask=real, other=0.0) - mean
        pull = tl.load(steered_ptr + place, mask=real, other=0.0) - steered_mean
        alignment += tl.sum(tl.where(real, v * pull, 0.0), 1)
        first += SAMPLES
    count = B.to(ACC)
    L_b = tl.sum(boosting, 0) / count
    L_a = tl.sum(alignment, 0) / (2 * SCALING * count)
    tl.store(loss_ptr, L_b + L_a)
    tl.store(boosting_ptr, L_b)
    tl.store(alignment_ptr, L_a)


def launches(
    inputs: tuple[torch.Tensor, ...],
    head_bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    coopvec: torch.Tensor,
    results: Sequence[torch.Tensor],
    kept: Scratch,
    scaling: float,
    centered: bool,
    launch: Config,
) -> list[Launch]:
    """What :func:`neulig_loss` launches.

    ``inputs``: features, Portland (weight and bias), head and alignment; ``results``: scalars.
    """
    features, weight, bias, head, alignment = inputs
    (B, N), (C, D), tiles = coopvec.shape, head.shape, kept.parts.shape[1]
    found = [
        ensemble_launch(features, (weight, bias), alignment, coopvec, None, kept, launch),
        classes_launch(head, head_bias, targets, None, kept),
    ]
    width = tiles_at_once(tiles)
    if targets is None:
        arguments = (kept.ensemble, kept.norm, head, head_bias, kept.parts, B, C, tiles)
        options = {"D": D, **TILE_OPTIONS, "TILES": width}
        programs = -(-B // SAMPLES) * tiles
        found.append(Launch(neulig_loss_entropy_kernel, programs, arguments, options))
    options = {
        "N": N,
        "EXPERTS": launch.experts,
        "SAMPLES": min(2048 // width, 4096 // launch.experts),
        "TILES": width,
        "SCALING": scaling,
        "CENTERED": centered,
        "num_warps": 8,
    }
    arguments = (kept.parts, kept.target, coopvec, kept.steered, *results, B, tiles)
    return [*found, Launch(neulig_loss_total_kernel, 1, arguments, options)]


def neulig_loss(
    features: torch.Tensor,
    portland_weight: torch.Tensor,
    portland_bias: torch.Tensor,
    head_weight: torch.Tensor,
    head_bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    alignment: torch.Tensor,
    boosting: str,
    scaling: float,
    normalize: bool,
    centered: bool,
) -> tuple[torch.Tensor, ...]:
    """loss, boosting, alignment and coopvec (B, N); arguments as the op's.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("neulig_loss", why_not(features, portland_weight, head_weight))
    B, N, _ = features.shape
    coopvec = features.new_empty((B, N), dtype=torch.promote_types(features.dtype, torch.float32))
    results = [coopvec.new_empty(()) for _ in range(3)]
    supervised = boosting == "supervised"
    kept = scratch(coopvec, head_weight, supervised, normalize)
    small = [None if x is None else x.contiguous() for x in (portland_bias, head_bias, targets)]
    inputs = (features, portland_weight, small[0], head_weight, alignment.contiguous())
    labels = small[2] if supervised else None
    launch = config("neulig_loss", features.dtype, N, 1)
    run(
        features,
        launches(inputs, small[1], labels, coopvec, results, kept, scaling, centered, launch),
    )
    return (*results, coopvec)

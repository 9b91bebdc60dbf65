"""The passes over a head that NeuLig's loss and its gradient share: see neulig_loss."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._launch import REGISTERS, Config, Launch, tl, triton
from ._portland import PRECISION, coopvecs, shifted, steer

SAMPLES, CLASSES, COLUMNS = 16, 32, 32  # of a tile of logits, and columns of its products at once
TILE_OPTIONS = {
    "SAMPLES": SAMPLES,
    "CLASSES": CLASSES,
    "COLUMNS": COLUMNS,
    "num_warps": 4,
    "maxnreg": REGISTERS,
}


@triton.jit(do_not_specialize=["B"])
def neulig_loss_ensemble_kernel(
    features_ptr, weight_ptr, bias_ptr, alignment_ptr, coopvec_ptr, steered_ptr, ensemble_ptr,
    norm_ptr, along_ptr, target_ptr, B, D: tl.constexpr, N: tl.constexpr, EXPERTS: tl.constexpr,
    SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """w = softmax(W u + c), (A + A') w, e = Σ_i w_i z_i and ‖e‖ of SAMPLES samples.

    features (B, N, D), weight (N, N * D), bias (N,) and alignment (N, N), floats; coopvec and
    steered (B, N), ensemble (B, D), norm (B,), None without normalisation, in the type of sums;
    all contiguous. weight None: w is read from coopvec. along (B, N), unless None: <z_i, e>.
    target (B,), unless None: NaN, for the logit of a target that is no class.
    Reads 2 N D values per sample, the second time from cache, and N * N * D per program.
    """
    ACC: tl.constexpr = steered_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    used = b < B
    sample_ptrs = features_ptr + b * N * D
    i = tl.arange(0, EXPERTS)
    real = used[:, None] & (i < N)[None, :]
    places = b[:, None] * N + i[None, :]
    if weight_ptr is None:
        w = tl.load(coopvec_ptr + places, mask=real, other=0.0)
    else:
        w = coopvecs(
            sample_ptrs, used, weight_ptr, bias_ptr, N * D, ACC, N, EXPERTS, SAMPLES, COLUMNS
        )
        tl.store(coopvec_ptr + places, w, mask=real)
    tl.store(steered_ptr + places, steer(w, alignment_ptr, ACC, N, EXPERTS), mask=real)
    squares = tl.zeros((SAMPLES, COLUMNS), ACC)
    along = tl.zeros((SAMPLES, EXPERTS), ACC)
    for d in range(0, D, COLUMNS):
        column = d + tl.arange(0, COLUMNS)
        inside = used[:, None] & (column < D)[None, :]
        z = tl.load(
            sample_ptrs[:, None, None] + i[None, :, None] * D + column[None, None, :],
            mask=inside[:, None, :] & (i < N)[None, :, None],
            other=0.0,
        ).to(ACC)
        e = tl.sum(w[:, :, None] * z, 1)
        squares += e * e
        if along_ptr is not None:
            along += tl.sum(z * e[:, None, :], 2)
        tl.store(ensemble_ptr + b[:, None] * D + column[None, :], e, mask=inside)
    if along_ptr is not None:
        tl.store(along_ptr + places, along, mask=real)
    if norm_ptr is not None:
        tl.store(norm_ptr + b, tl.sqrt(tl.sum(squares, 1)), mask=used)
    if target_ptr is not None:
        tl.store(target_ptr + b, tl.full((SAMPLES,), float("nan"), ACC), mask=used)


@triton.jit
def tile_logits(
    ensemble_ptr, norm_ptr, head_ptr, bias_ptr, b, c, B, C, D: tl.constexpr,
    SAMPLES: tl.constexpr, CLASSES: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = H e / ‖e‖ + h of the samples ``b`` and the classes ``c``; -inf beyond the last class."""
    ACC: tl.constexpr = ensemble_ptr.dtype.element_ty
    y = tl.zeros((SAMPLES, CLASSES), ACC)
    for d in range(0, D, COLUMNS):
        column = d + tl.arange(0, COLUMNS)[None, :]
        real = (b < B)[:, None] & (column < D)
        e = tl.load(ensemble_ptr + b[:, None] * D + column, mask=real, other=0.0)
        real = (c < C)[:, None] & (column < D)
        head = tl.load(head_ptr + c[:, None] * D + column, mask=real, other=0.0).to(ACC)
        y = tl.dot(e, tl.trans(head), y, input_precision=PRECISION, out_dtype=ACC)
    if norm_ptr is not None:
        y = y / tl.load(norm_ptr + b, mask=b < B, other=1.0)[:, None]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    return tl.where((c < C)[None, :], y, -float("inf"))


@triton.jit(do_not_specialize=["B", "C", "tiles"])
def neulig_loss_classes_kernel(
    ensemble_ptr, norm_ptr, head_ptr, bias_ptr, labels_ptr, parts_ptr, target_ptr, logits_ptr,
    B, C, tiles, D: tl.constexpr, SAMPLES: tl.constexpr, CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Maximum and sum of exponentials of a tile's logits, per sample: parts (2, tiles, B).

    ensemble (B, D), norm (B,) or None; head (C, D) and bias (C,) or None, floats; labels (B,)
    int64 and target (B,), which receives the labels' logits, or both None; logits (B, C) is
    written unless it is None.
    Programs of the same samples are neighbours. Reads D (SAMPLES + CLASSES) values.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // tiles * SAMPLES + tl.arange(0, SAMPLES)
    tile = program % tiles
    c = tile * CLASSES + tl.arange(0, CLASSES)
    y = tile_logits(
        ensemble_ptr, norm_ptr, head_ptr, bias_ptr, b, c, B, C, D, SAMPLES, CLASSES, COLUMNS
    )
    top = tl.max(y, 1)
    used = b < B
    total = tl.sum(tl.exp(y - shifted(top)[:, None]), 1)
    tl.store(parts_ptr + tile * B + b, top, mask=used)
    tl.store(parts_ptr + (tiles + tile) * B + b, total, mask=used)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + b, mask=used, other=-1)
        hit = (label[:, None] == c[None, :]) & (c < C)[None, :]
        here = used & (tl.max(hit.to(tl.int32), 1) > 0)
        tl.store(target_ptr + b, tl.sum(tl.where(hit, y, 0.0), 1), mask=here)
    if logits_ptr is not None:
        inside = used[:, None] & (c < C)[None, :]
        tl.store(logits_ptr + b[:, None] * C + c[None, :], y, mask=inside)


@triton.jit
def joined(parts_ptr, b, tiles, B, SAMPLES: tl.constexpr, TILES: tl.constexpr):
    """The maximum of all logits, and the sum of exponentials of the rest, of the samples ``b``."""
    top = tl.full((SAMPLES,), -float("inf"), parts_ptr.dtype.element_ty)
    first = tiles * 0
    while first < tiles:
        tile = first + tl.arange(0, TILES)[None, :].to(tl.int64)
        real = (b < B)[:, None] & (tile < tiles)
        part = tl.load(parts_ptr + tile * B + b[:, None], mask=real, other=-float("inf"))
        top = tl.maximum(top, tl.max(part, 1))
        first += TILES
    total = tl.zeros((SAMPLES,), parts_ptr.dtype.element_ty)
    first = tiles * 0
    while first < tiles:
        tile = first + tl.arange(0, TILES)[None, :].to(tl.int64)
        real = (b < B)[:, None] & (tile < tiles)
        part = tl.load(parts_ptr + tile * B + b[:, None], mask=real, other=-float("inf"))
        count = tl.load(parts_ptr + (tiles + tile) * B + b[:, None], mask=real, other=0.0)
        total += tl.sum(count * tl.exp(part - shifted(top)[:, None]), 1)
        first += TILES
    return shifted(top), tl.where(b < B, total, 1.0)


class Scratch(NamedTuple):
    """What one launch leaves for the next; the names are those of the kernels' arguments."""

    steered: torch.Tensor
    ensemble: torch.Tensor
    norm: torch.Tensor | None
    target: torch.Tensor | None
    parts: torch.Tensor


def scratch(
    coopvec: torch.Tensor, head: torch.Tensor, supervised: bool, normalize: bool
) -> Scratch:
    """For coopvec (B, N) and a head (C, D)."""
    B, (C, D) = coopvec.shape[0], head.shape
    return Scratch(
        torch.empty_like(coopvec),
        coopvec.new_empty(B, D),
        coopvec.new_empty(B) if normalize else None,
        coopvec.new_empty(B) if supervised else None,
        coopvec.new_empty(2 if supervised else 3, -(-C // CLASSES), B),
    )


def ensemble_launch(
    features: torch.Tensor,
    portland: tuple[torch.Tensor | None, torch.Tensor | None],
    alignment: torch.Tensor,
    coopvec: torch.Tensor,
    along: torch.Tensor | None,
    kept: Scratch,
    launch: Config,
) -> Launch:
    B, N, D = features.shape
    arguments = (features, *portland, alignment, coopvec, kept.steered, kept.ensemble, kept.norm,
                 along, kept.target, B)  # fmt: skip
    options = {
        "D": D,
        "N": N,
        "EXPERTS": launch.experts,
        "SAMPLES": launch.held,
        "COLUMNS": launch.block,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
    }
    return Launch(neulig_loss_ensemble_kernel, -(-B // launch.held), arguments, options)


def classes_launch(
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor | None,
    logits: torch.Tensor | None,
    kept: Scratch,
) -> Launch:
    (C, D), (_, tiles, B) = head.shape, kept.parts.shape
    arguments = (kept.ensemble, kept.norm, head, bias, targets, kept.parts, kept.target, logits,
                 B, C, tiles)  # fmt: skip
    options = {"D": D, **TILE_OPTIONS}
    return Launch(neulig_loss_classes_kernel, -(-B // SAMPLES) * tiles, arguments, options)


def tiles_at_once(tiles: int) -> int:
    """How many parts of a sample are joined side by side: a power of two, at most 64."""
    return min(1 << (tiles - 1).bit_length(), 64)

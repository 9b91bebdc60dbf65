"""From the gradient of NeuLig's logits to those of the Portland, the features and the head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ._launch import REGISTERS, Config, Launch, tl, triton
from ._logits import Scratch
from ._portland import PRECISION, mean_row, softmax_gradient

SAMPLES, CLASSES, COLUMNS = 16, 32, 32  # of a tile, and as many classes and samples at once


@triton.jit
def incoming(loss_ptr, part_ptr, ACC: tl.constexpr):
    """The gradient of a term: that of the loss and its own, each None or a scalar."""
    total = tl.zeros((1,), ACC)
    if loss_ptr is not None:
        total += tl.load(loss_ptr).to(ACC)
    if part_ptr is not None:
        total += tl.load(part_ptr).to(ACC)
    return total


@triton.jit(do_not_specialize=["B", "C", "blocks"])
def neulig_loss_pull_kernel(
    features_ptr, slope_ptr, head_ptr, raw_ptr, partials_ptr, B, C, blocks,
    D: tl.constexpr, N: tl.constexpr, SAMPLES: tl.constexpr, CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """r = H' ∂y on COLUMNS columns of SAMPLES samples, and partials (blocks, B, N): <z_i, r> there.

    features (B, N, D) and head (C, D), floats; slope (B, C), raw (B, D) for r or None. Programs of
    the same samples are neighbours.
    """
    ACC: tl.constexpr = slope_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks * SAMPLES + tl.arange(0, SAMPLES)
    block = program % blocks
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.zeros((SAMPLES, COLUMNS), ACC)
    first = C * 0
    while first < C:
        c = first + tl.arange(0, CLASSES)
        real = (b < B)[:, None] & (c < C)[None, :]
        dy = tl.load(slope_ptr + b[:, None] * C + c[None, :], mask=real, other=0.0)
        real = (c < C)[:, None] & (column < D)[None, :]
        place = c[:, None] * D + column[None, :]
        head = tl.load(head_ptr + place, mask=real, other=0.0).to(ACC)
        r = tl.dot(dy, head, r, input_precision=PRECISION, out_dtype=ACC)
        first += CLASSES
    inside = (b < B)[:, None] & (column < D)[None, :]
    if raw_ptr is not None:
        tl.store(raw_ptr + b[:, None] * D + column[None, :], r, mask=inside)
    for i in range(N):
        place = (b[:, None] * N + i) * D + column[None, :]
        z = tl.load(features_ptr + place, mask=inside, other=0.0).to(ACC)
        tl.store(partials_ptr + (block * B + b) * N + i, tl.sum(z * r, 1), mask=b < B)


@triton.jit(do_not_specialize=["B", "blocks"])
def neulig_loss_portland_kernel(
    partials_ptr, coopvec_ptr, steered_ptr, along_ptr, norm_ptr, loss_ptr, alignment_ptr,
    own_ptr, logits_ptr, radial_ptr, B, blocks, N: tl.constexpr, EXPERTS: tl.constexpr,
    SAMPLES: tl.constexpr, SCALING: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """∂a (B, N) into logits, of partials (blocks, B, N) of <z_i, r>.

    coopvec, steered and along (B, N) of the ensemble kernel, norm (B,), the last two or None; loss
    and alignment: incoming scalars or None; own (B, N): that of the CoopVec, or None. radial (B,)
    or None: <e, r> / ‖e‖², what the tangent takes off r, times e.
    """
    ACC: tl.constexpr = logits_ptr.dtype.element_ty
    b = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    i = tl.arange(0, EXPERTS)
    inside = (b < B)[:, None] & (i < N)[None, :]
    place = b[:, None] * N + i[None, :]
    w = tl.load(coopvec_ptr + place, mask=inside, other=0.0)
    q = tl.zeros((SAMPLES, EXPERTS), ACC)
    block = blocks * 0
    while block < blocks:
        q += tl.load(partials_ptr + block.to(tl.int64) * B * N + place, mask=inside, other=0.0)
        block += 1
    if norm_ptr is not None:
        norm = tl.load(norm_ptr + b, mask=b < B, other=1.0)
        radial = tl.sum(w * q, 1) / (norm * norm)
        along = tl.load(along_ptr + place, mask=inside, other=0.0)
        q = (q - along * radial[:, None]) / norm[:, None]
        if radial_ptr is not None:
            tl.store(radial_ptr + b, radial, mask=b < B)
    steered = tl.load(steered_ptr + place, mask=inside, other=0.0)
    if CENTERED:
        steered -= mean_row(steered_ptr, B, N, EXPERTS, SAMPLES)
    q += steered * (incoming(loss_ptr, alignment_ptr, ACC) / (SCALING * B.to(ACC)))[:, None]
    if own_ptr is not None:
        q += tl.load(own_ptr + place, mask=inside, other=0.0)
    tl.store(logits_ptr + place, softmax_gradient(w, q), mask=inside)


@triton.jit(do_not_specialize=["B", "blocks"])
def neulig_loss_products_kernel(
    left_ptr, right_ptr, divisor_ptr, products_ptr, sums_ptr, B, height, width, blocks,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """products (height, width) = Σ_b left_b right_b' / divisor_b, and sums (height,) = Σ_b left_b.

    left (B, height) and divisor (B,) or None in the type of sums, right (B, width) in any float;
    sums are one more column of the products, with a right side of ones. Samples in order, SAMPLES
    at a time.
    """
    ACC: tl.constexpr = left_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    i = program // blocks * ROWS + tl.arange(0, ROWS)
    j = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), ACC)
    first = B * 0
    while first < B:
        b = (first + tl.arange(0, SAMPLES)).to(tl.int64)
        real = (b < B)[:, None] & (i < height)[None, :]
        left = tl.load(left_ptr + b[:, None] * height + i[None, :], mask=real, other=0.0)
        real = (b < B)[:, None] & (j < width)[None, :]
        place = b[:, None] * width + j[None, :]
        right = tl.load(right_ptr + place, mask=real, other=0.0).to(ACC)
        if divisor_ptr is not None:
            right = right / tl.load(divisor_ptr + b, mask=b < B, other=1.0)[:, None]
        right = tl.where((j == width)[None, :], 1.0, right)
        total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION, out_dtype=ACC)
        first += SAMPLES
    mask = (i < height)[:, None] & (j < width)[None, :]
    tl.store(products_ptr + i[:, None] * width + j[None, :], total, mask=mask)
    own = tl.sum(tl.where((j == width)[None, :], total, 0.0), 1)
    tl.store(sums_ptr + i, own, mask=(i < height) & (program % blocks == blocks - 1))


@triton.jit(do_not_specialize=["B", "blocks"])
def neulig_loss_features_kernel(
    coopvec_ptr, raw_ptr, ensemble_ptr, norm_ptr, radial_ptr, logits_ptr, weight_ptr, out_ptr,
    B, blocks, D: tl.constexpr, N: tl.constexpr, EXPERTS: tl.constexpr, SAMPLES: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """∂z_i = w_i d + Σ_k ∂a_k W[k, i], with d = (r - e radial) / ‖e‖: out (B, N, D).

    Arguments as of the other kernels; norm and radial None without normalisation, where d = r.
    EXPERTS is at least 16, the least that a product sums over.
    """
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks * SAMPLES + tl.arange(0, SAMPLES)
    column = program % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = (b < B)[:, None] & (column < D)[None, :]
    place = b[:, None] * D + column[None, :]
    d = tl.load(raw_ptr + place, mask=inside, other=0.0)
    if norm_ptr is not None:
        e = tl.load(ensemble_ptr + place, mask=inside, other=0.0)
        radial = tl.load(radial_ptr + b, mask=b < B, other=0.0)
        d = (d - e * radial[:, None]) / tl.load(norm_ptr + b, mask=b < B, other=1.0)[:, None]
    k = tl.arange(0, EXPERTS)
    real = (b < B)[:, None] & (k < N)[None, :]
    da = tl.load(logits_ptr + b[:, None] * N + k[None, :], mask=real, other=0.0)
    real = (k < N)[:, None] & (column < D)[None, :]
    for i in range(N):
        w = tl.load(coopvec_ptr + b * N + i, mask=b < B, other=0.0)
        row = weight_ptr + (k[:, None] * N + i) * D
        weight = tl.load(row + column[None, :], mask=real, other=0.0).to(ACC)
        total = tl.dot(da, weight, w[:, None] * d, input_precision=PRECISION, out_dtype=ACC)
        tl.store(out_ptr + (b[:, None] * N + i) * D + column[None, :], total, mask=inside)


def product_launch(
    left: torch.Tensor,
    right: torch.Tensor,
    divisor: torch.Tensor | None,
    products: torch.Tensor,
    sums: torch.Tensor,
) -> Launch:
    """``products`` = left' (right / divisor) and ``sums`` = left' 1."""
    height, width = products.shape
    rows, blocks = min(1 << (height - 1).bit_length(), 32), width // COLUMNS + 1
    arguments = (left, right, divisor, products, sums, len(left), height, width, blocks)
    options = {"ROWS": rows, "COLUMNS": COLUMNS, "SAMPLES": 32, "num_warps": 4,
               "maxnreg": REGISTERS}  # fmt: skip
    return Launch(neulig_loss_products_kernel, -(-height // rows) * blocks, arguments, options)


class Inputs(NamedTuple):
    """The op's tensors, and incoming gradients: of loss, boosting, alignment and coopvec."""

    grads: tuple[torch.Tensor | None, ...]
    coopvec: torch.Tensor
    features: torch.Tensor
    portland_weight: torch.Tensor
    head_weight: torch.Tensor
    head_bias: torch.Tensor | None
    targets: torch.Tensor | None
    alignment: torch.Tensor


def portland_launches(
    x: Inputs, kept: Scratch, along: torch.Tensor | None, slope: torch.Tensor,
    gradients: Sequence[torch.Tensor | None], scaling: float, centered: bool, launch: Config,
) -> list[Launch]:  # fmt: skip
    """From ∂L_b/∂y to the gradients of features, Portland weight and bias, where there is room."""
    (B, N, D), C, w = x.features.shape, x.head_weight.shape[0], x.coopvec
    blocks, rows = -(-D // COLUMNS), -(-B // SAMPLES)
    partials, da = w.new_empty(blocks, B, N), torch.empty_like(w)
    features, weight, bias = gradients
    raw = None if features is None else torch.empty_like(kept.ensemble)
    radial = None if kept.norm is None else torch.empty_like(kept.norm)
    shared = {"N": N, "SAMPLES": SAMPLES, "num_warps": 4, "maxnreg": REGISTERS}
    tile = {**shared, "D": D, "COLUMNS": COLUMNS}
    pull = (x.features, slope, x.head_weight, raw, partials, B, C, blocks)
    loss, _, alignment, own = x.grads
    logits = (partials, w, kept.steered, along, kept.norm, loss, alignment, own, da, radial,
              B, blocks)  # fmt: skip
    settings = {"EXPERTS": launch.experts, "SCALING": scaling, "CENTERED": centered}
    found = [
        Launch(neulig_loss_pull_kernel, rows * blocks, pull, {**tile, "CLASSES": CLASSES}),
        Launch(neulig_loss_portland_kernel, rows, logits, {**shared, **settings}),
    ]
    if weight is not None and bias is not None:
        found.append(product_launch(da, x.features, None, weight, bias))
    if features is not None:
        arguments = (w, raw, kept.ensemble, kept.norm, radial, da, x.portland_weight,
                     features, B, blocks)  # fmt: skip
        options = {**tile, "EXPERTS": max(launch.experts, 16)}
        found.append(Launch(neulig_loss_features_kernel, rows * blocks, arguments, options))
    return found

"""The layer norms on Triton: of N experts, or of merged models, which differ in gain and shift."""

from __future__ import annotations

import math

import torch

from ._launch import (
    REGISTERS,
    Launch,
    alignment,
    stride,
    tl,
    triton,
    why_not_layer,
)
from ._mixture import mixed
from ._tiles import WIDEST_NORM, norm_rows


@triton.jit
def _of_model(
    coef_ptr, coef_step, first_ptr, row_stride, group, column, mask, N,
    ACC: tl.constexpr,
):  # fmt: skip
    """Gains or shifts (WIDTH,) of a group: of its expert, or of its merged model."""
    if coef_ptr is None:
        row = first_ptr + group * row_stride
        return tl.load(row + column, mask=mask, other=0.0).to(ACC)
    else:
        return mixed(coef_ptr, coef_step, first_ptr, row_stride, column, mask, N, ACC)


@triton.jit(
    do_not_specialize=["N", "R", "x_units", "row_units", "beside_units", "beside_row_units",
                       "gain_units", "shift_units", "coef_stride", "coef_step"]
)  # fmt: skip
def layer_norm_kernel(
    x_ptr, residual_ptr, gain_ptr, shift_ptr, coef_ptr, y_ptr, s_ptr,
    N: tl.int64, R: tl.int64,
    x_units: tl.int64, row_units: tl.int64, beside_units: tl.int64, beside_row_units: tl.int64,
    gain_units: tl.int64, shift_units: tl.int64, coef_stride: tl.int64, coef_step: tl.int64,
    D: tl.constexpr, EPS: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """s = x + residual; y = (s - mean(s)) / sqrt(var(s) + EPS) * gain + shift, row by row.

    x and residual (G, R, D), any strides but the last, which is 1; y and s the same, contiguous;
    residual and s may be None. Group g takes gain[g] and shift[g], or with coef (G, N), any float
    type, their sums weighted by coef[g]; gain and shift (N, D), shift may be None. One of fp32,
    bf16, fp16 and fp64; strides, but those of coef, are multiples of UNIT.
    s is rounded to its type, all else is in fp32 (fp64 for fp64): a program holds ROWS rows, so
    that the variance is the mean of squared deviations without another read. y is rounded once.
    Moves 2 or, with a residual, 4 G R D values, and the gains and shifts.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    R = R.to(tl.int64)
    STORED: tl.constexpr = x_ptr.dtype.element_ty
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = (R + ROWS - 1) // ROWS
    program = tl.program_id(0).to(tl.int64)
    group = program // blocks
    row = program % blocks * ROWS + tl.arange(0, ROWS)
    r = tl.minimum(row, R - 1)[:, None]  # past the end the last row again, which is not stored
    column = tl.arange(0, WIDTH)
    inside = column < D
    kept = (row < R)[:, None] & inside[None, :]
    x = x_ptr + (group * x_units + r * row_units) * UNIT + column[None, :]
    s = tl.load(x, mask=inside[None, :], other=0.0).to(ACC)
    out = (group * R + row)[:, None] * D + column[None, :]
    if residual_ptr is not None:
        residual_ptr += group * beside_units * UNIT
        beside = residual_ptr + r * beside_row_units * UNIT + column[None, :]
        total = (s + tl.load(beside, mask=inside[None, :], other=0.0).to(ACC)).to(STORED)
        tl.store(s_ptr + out, total, mask=kept)
        s = total.to(ACC)
    # The mean of large values is rounded like them; that of what is left of them is not.
    centred = tl.where(inside[None, :], s - (tl.sum(s, 1) / D)[:, None], 0.0)
    centred = tl.where(inside[None, :], centred - (tl.sum(centred, 1) / D)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + EPS)
    coefs = None
    if coef_ptr is not None:
        coefs = coef_ptr + group * coef_stride
    gain = _of_model(coefs, coef_step, gain_ptr, gain_units * UNIT, group, column, inside, N, ACC)
    y = centred * scale[:, None] * gain[None, :]
    if shift_ptr is not None:
        shift = _of_model(
            coefs, coef_step, shift_ptr, shift_units * UNIT, group, column, inside, N, ACC
        )
        y += shift[None, :]
    tl.store(y_ptr + out, y.to(STORED), mask=kept)


def why_not(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> str | None:
    """Why Triton cannot take this call, or None."""
    widest = WIDEST_NORM // max(x.itemsize, 4) // (1 if coef is None else 2)
    if x.shape[-1] > widest:
        return f"rows of {x.shape[-1]} values, more than {widest} in {x.dtype}"
    return why_not_layer(weight, x=x, bias=bias, residual=residual)


def results(x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for y and s."""
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)


def launches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    s: torch.Tensor,
) -> list[Launch]:
    """What both launchers launch; ``coef`` is None for layer norms of experts."""
    G, R, D = x.shape
    width = triton.next_power_of_2(D)
    rows, num_warps = norm_rows(x.dtype, width, R)
    strides = [
        stride(tensor, dim) if tensor is not None else 0
        for tensor, dim in ((x, 0), (x, 1), (residual, 0), (residual, 1), (weight, 0), (bias, 0))
    ]
    unit = alignment(math.gcd(*strides))
    options = {
        "D": D,
        "EPS": eps,
        "UNIT": unit,
        "ROWS": rows,
        "WIDTH": width,
        "num_warps": num_warps,
        "maxnreg": min(REGISTERS, 65536 // (32 * num_warps)),  # what a multiprocessor has
    }
    tensors = (x, residual, weight, bias, coef, y, s if residual is not None else None)
    numbers = (
        weight.shape[0],
        R,
        *(n // unit for n in strides),
        *((0, 0) if coef is None else coef.stride()),
    )
    return [Launch(layer_norm_kernel, G * -(-R // rows), (*tensors, *numbers), options)]

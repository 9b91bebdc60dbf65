"""mixture_linear on Triton: y[b, t] = f(sum_i coef[b, i] (W_i x[b, t] + b_i))."""

from __future__ import annotations

import math

import torch

from . import expert_linear
from ._gemm import activate, large, load_bias, options, place_of, precision, product, store_tile
from ._launch import (
    REGISTERS,
    Launch,
    alignment,
    require,
    run,
    stride,
    tl,
    triton,
    why_not_layer,
    with_rows,
)
from ._mixture import mixed_held, weighted
from ._rows import load_experts
from ._tiles import MERGED_BYTES, Tile, merges_first, product_tile


@triton.jit(
    do_not_specialize=["R", "T", "x_units", "row_units", "expert_units", "weight_units",
                       "coef_stride", "coef_step"]
)  # fmt: skip
def mixture_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, coef_ptr, out_ptr,
    R: tl.int64, T: tl.int64, x_units: tl.int64, row_units: tl.int64, expert_units: tl.int64,
    weight_units: tl.int64, bias_stride: tl.int64, coef_stride: tl.int64, coef_step: tl.int64,
    N: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[r, o] = f(sum_i coef[b, i] * (sum_k weight[i, o, k] * x[b, t, k] + bias[i, o])).

    Row r = b * T + t of R = B * T; x (B, T, I) and weight (N, O, I), any strides but the last,
    which is 1, all multiples of UNIT; bias (N, O) or None; coef (B, N), any float type; out
    (R, O) contiguous; the others one of fp32, bf16, fp16 and fp64. A sum of its own per expert,
    weighted in its type, fp32 (fp64 for fp64), one rounding at the end. 2 R N O I flops; N O I
    values of weight, R I of x and R O of out move. Experts that no row of a tile asks for are not
    read.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    R = R.to(tl.int64)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_r = (R + ROWS - 1) // ROWS
    tiles_o = (HEIGHT + COLUMNS - 1) // COLUMNS
    tile_r, tile_o = place_of(tl.program_id(0).to(tl.int64), tiles_r, tiles_o, GROUP)
    row = tile_r * ROWS + tl.arange(0, ROWS)
    column = tile_o * COLUMNS + tl.arange(0, COLUMNS)
    # Past the end the last one again: loads need no mask, and what comes of it is not stored.
    r = tl.minimum(row, R - 1)
    o = tl.minimum(column, HEIGHT - 1)
    x_rows = x_ptr + (r // T * x_units + r % T * row_units) * UNIT
    weight_rows = weight_ptr + o * weight_units * UNIT
    coefs = coef_ptr + r // T * coef_stride
    y = tl.zeros((ROWS, COLUMNS), ACC)
    if bias_ptr is not None:  # not with the products: its addresses would take their registers
        for i in range(N):
            w = tl.load(coefs + i * coef_step).to(ACC)
            bias = load_bias(bias_ptr + i * bias_stride, column, HEIGHT, ACC)
            y += weighted(w[:, None], bias)
    for i in range(N):
        w = tl.load(coefs + i * coef_step).to(ACC)
        if tl.max((w != 0).to(tl.int32), 0) > 0:
            term = product(
                x_rows, weight_rows + i * expert_units * UNIT,
                ACC, WIDTH, ROWS, COLUMNS, DEPTH, STAGES, PRECISION,
            )  # fmt: skip
            y += weighted(w[:, None], term)
    store_tile(out_ptr, activate(y, ACTIVATION), row, column, R, HEIGHT)


@triton.jit(do_not_specialize=["K", "expert_units", "coef_stride", "coef_step"])
def mixture_linear_merge_kernel(
    weight_ptr, bias_ptr, coef_ptr, merged_ptr, merged_bias_ptr, K: tl.int64,
    expert_units: tl.int64, bias_stride: tl.int64, coef_stride: tl.int64, coef_step: tl.int64,
    N: tl.constexpr, HELD: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """merged[b, o, k] = sum_i coef[b, i] * weight[i, o, k], and merged_bias[b, o] so from bias.

    coef (K, N), any float type and strides; weight (N, O, I), contiguous but for its first stride,
    a multiple of UNIT; merged (K, O, I) in its type; bias (N, O) and merged_bias (K, O), fp32 (fp64
    for fp64), or None. Sums in fp32 (fp64 for fp64) in expert order, one rounding. Moves
    (N + K) O (I + 1) values where HELD = N. The last programs take the bias.
    """
    ACC: tl.constexpr = tl.float64 if weight_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks = (HEIGHT * WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    row = K * 0
    if program < blocks:
        place = program * BLOCK + lanes
        mask = place < HEIGHT * WIDTH
        stride = expert_units * UNIT
        held = load_experts(weight_ptr, stride, place, mask, HELD)
        while row < K:  # the interpreter's range() refuses kernel arguments since numpy 2.4
            coefs = coef_ptr + row * coef_stride
            merged = mixed_held(
                held, coefs, coef_step, weight_ptr, stride, place, mask, ACC, N, HELD
            )
            out = merged_ptr + row * (HEIGHT * WIDTH) + place
            tl.store(out, merged.to(merged_ptr.dtype.element_ty), mask=mask)
            row += 1
    elif bias_ptr is not None:
        place = (program - blocks) * BLOCK + lanes
        mask = place < HEIGHT
        held = load_experts(bias_ptr, bias_stride, place, mask, HELD)
        while row < K:
            coefs = coef_ptr + row * coef_stride
            merged = mixed_held(
                held, coefs, coef_step, bias_ptr, bias_stride, place, mask, ACC, N, HELD
            )
            tl.store(merged_bias_ptr + row * HEIGHT + place, merged, mask=mask)
            row += 1


def why_not(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor,
    activation: str | None = None,
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return why_not_layer(weight, bias=bias)


def mixture_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor,
    activation: str | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(B, T, O) in x's dtype; arguments as the op's.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("mixture_linear", why_not(x, weight, bias, coef, activation))
    (B, T, _), (N, height, _) = x.shape, weight.shape
    out = x.new_empty((B, T, height))
    if out.numel() > 0:
        tf32 = precision(x.dtype) == "tf32"
        if weight[0].is_contiguous() and merges_first(x.dtype, T, N, tf32=tf32):
            by_merging(with_rows(x), weight, bias, coef, activation, out, tile)
        else:
            run(x, launches(with_rows(x), weight, bias, coef, activation, out, tile))
    return out


def launches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor,
    activation: str | None,
    out: torch.Tensor,
    tile: Tile | None = None,
) -> list[Launch]:
    """What :func:`mixture_linear` launches for this call, samples with models of their own."""
    (N, height, _), (_, T, _) = weight.shape, x.shape
    R, multiply = out.numel() // height, precision(x.dtype)
    strides = stride(x, 0), stride(x, 1), stride(weight, 0), stride(weight, 1)
    unit = alignment(math.gcd(*strides))
    tile = tile or product_tile(
        x.dtype, R, height, unit, tf32=multiply == "tf32", sums=2, large=large()
    )
    bias_stride = 0 if bias is None else stride(bias, 0)
    units = (s // unit for s in strides)
    arguments = (x, weight, bias, coef, out, R, T, *units, bias_stride, *coef.stride())
    programs = -(-R // tile.rows) * -(-height // tile.columns)
    constants = {"N": N, **options(weight, activation, multiply, unit, tile)}
    return [Launch(mixture_linear_kernel, programs, arguments, constants)]


def by_merging(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor,
    activation: str | None,
    out: torch.Tensor,
    tile: Tile | None = None,
) -> None:
    """Merge the weights of a few samples, multiply, and so on in the same memory.

    Where few rows are multiplied this moves more than it saves; see ``merges_first``.
    """
    B, (_, height, width) = len(x), weight.shape
    samples = min(B, max(1, MERGED_BYTES // max(1, height * width * weight.itemsize)))
    merged = weight.new_empty((samples, height, width))
    sums = torch.promote_types(x.dtype, torch.float32)
    shift = None if bias is None else weight.new_empty((samples, height), dtype=sums)
    for first in range(0, B, samples):
        own = slice(first, min(first + samples, B))
        K = own.stop - own.start
        parts = merged[:K], None if shift is None else shift[:K]
        run(x, [merge_launch(weight, bias, coef[own], *parts)])
        expert_linear.multiply(x[own], *parts, activation, out[own], tile)


def merge_launch(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    coef: torch.Tensor,
    merged: torch.Tensor,
    shift: torch.Tensor | None,
) -> Launch:
    """What writes the weights and biases of merged models."""
    (N, height, width), block = weight.shape, 128 * 16 // weight.itemsize
    unit = alignment(stride(weight, 0))
    bias_stride = 0 if bias is None else stride(bias, 0)
    strides = stride(weight, 0) // unit, bias_stride, *coef.stride()
    constants = {
        "N": N,
        "HELD": N if N <= 8 else (N - 1) % 8 + 1,
        "HEIGHT": height,
        "WIDTH": width,
        "UNIT": unit,
        "BLOCK": block,
        "num_warps": 4,
        "maxnreg": REGISTERS,
    }
    programs = -(-height * width // block) + (0 if bias is None else -(-height // block))
    arguments = (weight, bias, coef, merged, shift, len(coef), *strides)
    return Launch(mixture_linear_merge_kernel, programs, arguments, constants)

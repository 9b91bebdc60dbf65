"""expert_linear on Triton: y[i, r] = f(W_i x[r] + b_i), or of x[i, r] where inputs differ."""

from __future__ import annotations

import math

import torch

from ._gemm import (
    activate,
    by_library,
    large,
    library_product,
    load_bias,
    options,
    place_of,
    precision,
    product,
    store_tile,
)
from ._launch import (
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
from ._tiles import Tile, product_tile


@triton.jit(do_not_specialize=["R", "x_units", "row_units", "expert_units", "weight_units"])
def expert_linear_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr,
    R: tl.int64, x_units: tl.int64, row_units: tl.int64, expert_units: tl.int64,
    weight_units: tl.int64, bias_stride: tl.int64, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out[i, r, o] = f(sum_k weight[i, o, k] * x[i, r, k] + bias[i, o]), f by its name.

    x (N, R, I), whose experts may lie at the same place; weight (N, O, I), any strides but the
    last, which is 1, all multiples of UNIT; bias (N, O) or None; out (N, R, O) contiguous; one of
    fp32, bf16, fp16 and fp64, bias also in the type of sums. Sums in fp32 (fp64 for fp64), one
    rounding at the end. 2 N R O I flops; N O I and N R O values, and R I or N R I, move.
    I and O are constants of a layer: their remainders decide at compile time what is masked.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    R = R.to(tl.int64)
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    tiles_r = (R + ROWS - 1) // ROWS
    tiles_o = (HEIGHT + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    expert = program // (tiles_r * tiles_o)
    tile_r, tile_o = place_of(program % (tiles_r * tiles_o), tiles_r, tiles_o, GROUP)
    row = tile_r * ROWS + tl.arange(0, ROWS)
    column = tile_o * COLUMNS + tl.arange(0, COLUMNS)
    # Past the end the last one again: loads need no mask, and what comes of it is not stored.
    r = tl.minimum(row, R - 1)
    o = tl.minimum(column, HEIGHT - 1)
    y = product(
        x_ptr + (expert * x_units + r * row_units) * UNIT,
        weight_ptr + (expert * expert_units + o * weight_units) * UNIT,
        ACC, WIDTH, ROWS, COLUMNS, DEPTH, STAGES, PRECISION,
    )  # fmt: skip
    if bias_ptr is not None:
        y += load_bias(bias_ptr + expert * bias_stride, column, HEIGHT, ACC)
    store_tile(out_ptr + expert * R * HEIGHT, activate(y, ACTIVATION), row, column, R, HEIGHT)


def why_not(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return why_not_layer(weight, bias=bias)


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """(N, R, O) in x's dtype; arguments as the op's.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("expert_linear", why_not(x, weight, bias, activation))
    out = x.new_empty((weight.shape[0], x.shape[-2], weight.shape[1]))
    if out.numel() > 0:
        multiply(with_rows(x), weight, bias, activation, out, tile)
    return out


def multiply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out: torch.Tensor,
    tile: Tile | None = None,
) -> None:
    """Write the results into ``out`` (N, R, O), contiguous."""
    if by_library(x):
        library_product(x, weight, bias, activation, out)
    else:
        run(x, launches(x, weight, bias, activation, out, tile))


def launches(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out: torch.Tensor,
    tile: Tile | None = None,
) -> list[Launch]:
    """What :func:`multiply` launches."""
    (N, height, _), R = weight.shape, x.shape[-2]
    multiply = precision(x.dtype)
    strides = (
        stride(x, 0) if x.ndim == 3 else 0,
        stride(x, -2),
        stride(weight, 0),
        stride(weight, 1),
    )
    unit = alignment(math.gcd(*strides))
    tile = tile or product_tile(x.dtype, R, height, unit, tf32=multiply == "tf32", large=large())
    bias_stride = 0 if bias is None else stride(bias, 0)
    arguments = (x, weight, bias, out, R, *(s // unit for s in strides), bias_stride)
    programs = N * -(-R // tile.rows) * -(-height // tile.columns)
    constants = options(weight, activation, multiply, unit, tile)
    return [Launch(expert_linear_kernel, programs, arguments, constants)]

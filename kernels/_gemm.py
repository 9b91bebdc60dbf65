"""What the linear layers share: where a tile lies, its product, its activation, its store."""

from __future__ import annotations

from typing import Any

import torch

from ..ops._activation import ACTIVATIONS
from ._launch import INTERPRETED, REGISTERS, tl, triton
from ._tiles import Tile

_INTERPRETED = tl.constexpr(INTERPRETED)


def precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied, as torch's own products on a GPU are told to; of others "ieee"."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


def large() -> bool:
    """Whether kernels run on a Hopper or Blackwell GPU of data centres: these multiply from shared
    memory, of which they have 227 KB."""
    return not INTERPRETED and 90 <= triton.runtime.driver.active.get_current_target().arch < 120


def by_library(x: torch.Tensor) -> bool:
    """Whether cuBLAS multiplies x: fp64, and fp32 without TF32, where it is 5 times as fast as the
    kernel (H100, benchmarks/results: 44 and 8 TFLOP/s) and there is little to fuse."""
    return x.is_cuda and x.dtype.itemsize > 2 and precision(x.dtype) == "ieee"


def library_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    out: torch.Tensor,
) -> None:
    """out[i] = f(x_i W_i^T + b_i): x (R, I) or (N, R, I), weight (N, O, I), bias (N, O) or None."""
    x = x.expand(len(weight), *x.shape[-2:])
    if bias is None:
        torch.bmm(x, weight.mT, out=out)
    else:
        torch.baddbmm(bias[:, None], x, weight.mT, out=out)
    if activation is not None:
        out.copy_(ACTIVATIONS[activation].function(out))


def options(
    weight: torch.Tensor, activation: str | None, multiply: str, unit: int, tile: Tile
) -> dict[str, Any]:
    """The constants of both kernels and how they are compiled."""
    return {
        "HEIGHT": weight.shape[1],
        "WIDTH": weight.shape[2],
        "ACTIVATION": activation or "",
        "PRECISION": multiply,
        "UNIT": unit,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "GROUP": tile.group,
        "STAGES": tile.stages,
        "num_warps": tile.num_warps,
        "maxnreg": REGISTERS,
    }


@triton.jit
def place_of(tile, tiles_r, tiles_o, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP tiles of rows next to each other, then the next columns."""
    group = tile // (GROUP * tiles_o)
    height = tl.minimum(tiles_r - group * GROUP, GROUP)
    within = tile % (GROUP * tiles_o)
    return group * GROUP + within % height, within // height


@triton.jit
def add_dot(sums, x, w, PRECISION: tl.constexpr):
    """sums + x @ w, in the type of ``sums``."""
    if _INTERPRETED:  # whose products of bf16 are those of the bits
        x = x.to(sums.dtype)
        w = w.to(sums.dtype)
    return tl.dot(x, w, sums, input_precision=PRECISION, out_dtype=sums.dtype)


@triton.jit
def product(
    x_rows, weight_rows, ACC: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_k x[r, k] * weight[o, k] over k < I, (ROWS, COLUMNS) in type ACC, from pointers to rows.

    Whole steps of DEPTH terms are not masked, so that their loads are wide.
    """
    k = tl.arange(0, DEPTH)
    x = x_rows[:, None] + k[None, :]
    w = weight_rows[None, :] + k[:, None]
    sums = tl.zeros((ROWS, COLUMNS), ACC)
    for first in tl.range(0, WIDTH - WIDTH % DEPTH, DEPTH, num_stages=STAGES):
        sums = add_dot(sums, tl.load(x + first), tl.load(w + first), PRECISION)
    if WIDTH % DEPTH > 0:
        inside = k < WIDTH % DEPTH
        last = WIDTH - WIDTH % DEPTH
        x_rest = tl.load(x + last, mask=inside[None, :], other=0.0)
        w_rest = tl.load(w + last, mask=inside[:, None], other=0.0)
        sums = add_dot(sums, x_rest, w_rest, PRECISION)
    return sums


@triton.jit
def load_bias(bias_ptr, column, HEIGHT: tl.constexpr, ACC: tl.constexpr):
    """(1, COLUMNS). Masked: addresses of columns that stop at the last one would take registers."""
    return tl.load(bias_ptr + column, mask=column < HEIGHT, other=0.0).to(ACC)[None, :]


@triton.jit
def erfc(z):
    """The complementary error function of z >= 0.

    The Chebyshev fit of Numerical Recipes (2nd edition, 6.2), but for fp64: no branches, and few
    enough registers for the end of a product, where CUDA's own spilled. In fp32 its relative error
    is 4e-7 up to z = 1 and grows with the rounding of z * z, to 4e-6 at 6.
    """
    if z.dtype == tl.float64:
        return 1.0 - tl.erf(z)
    t = 1.0 / (1.0 + 0.5 * z)
    p = -0.82215223 + t * 0.17087277
    p = -1.13520398 + t * (1.48851587 + t * p)
    p = -0.18628806 + t * (0.27886807 + t * p)
    p = 0.37409196 + t * (0.09678418 + t * p)
    p = -1.26551223 + t * (1.00002368 + t * p)
    return t * tl.exp(p - z * z)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    """The activation of a name of neulig_fast/ops/_activation.py; "" is none."""
    if ACTIVATION == "relu":
        return tl.where(y < 0, 0.0, y)  # a NaN stays
    elif ACTIVATION == "gelu":
        half = 0.5 * erfc(tl.abs(y) * 0.7071067811865476)
        return y * tl.where(y < 0, half, 1.0 - half)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u
        return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == "quick_gelu":
        return y * tl.sigmoid(1.702 * y)
    else:
        return y


@triton.jit
def store_tile(out_ptr, y, row, column, R, HEIGHT: tl.constexpr):
    """Round once and store at (row, column) of ``out``, (R, O) contiguous, what lies inside."""
    out = out_ptr + row[:, None] * HEIGHT + column[None, :]
    inside = (row < R)[:, None] & (column < HEIGHT)[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=inside)

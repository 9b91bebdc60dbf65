"""What the linear layers share: where a tile lies, its product, its activation, its store."""

from __future__ import annotations

from typing import Any

import torch

from ._launch import INTERPRETED, REGISTERS, tl, triton
from ._tiles import Tile

_INTERPRETED = tl.constexpr(INTERPRETED)


def precision(dtype: torch.dtype) -> str:
    """How fp32 is multiplied, as torch's own products on a GPU are told to; of others "ieee"."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and dtype == torch.float32 else "ieee"


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
def activate(y, ACTIVATION: tl.constexpr):
    """The activation of a name of neulig_fast/ops/_activation.py; "" is none."""
    if ACTIVATION == "relu":
        return tl.where(y < 0, 0.0, y)  # a NaN stays
    elif ACTIVATION == "gelu":
        return 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
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

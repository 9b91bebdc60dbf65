"""Loads of columns of rows of an arena."""

from __future__ import annotations

from ._launch import tl, triton


@triton.jit
def load_experts(first_ptr, row_stride, lanes, mask, COUNT: tl.constexpr):
    """COUNT rows from ``first_ptr`` on, as stored: every load before any use."""
    values = (tl.load(first_ptr + lanes, mask=mask),)
    for j in tl.static_range(1, COUNT):
        values += (tl.load(first_ptr + j * row_stride + lanes, mask=mask),)
    return values


@triton.jit
def load_row(
    row_ptr, p, start, stop, ACC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Columns p .. of a row, (ROWS, LANES) in type ACC; zeros outside start .. stop.

    WIDE: start and stop are multiples of LANES, and no access of LANES columns is cut. start None:
    all columns are inside.
    """
    rows = p + tl.arange(0, ROWS)[:, None] * LANES
    columns = rows + tl.arange(0, LANES)[None, :]
    mask = None
    other = None
    if start is not None:
        inside = rows if WIDE else columns
        mask = (inside >= start) & (inside < stop)
        other = 0.0
    return tl.load(row_ptr + columns, mask=mask, other=other).to(ACC)

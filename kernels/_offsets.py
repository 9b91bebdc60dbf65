"""Offsets of rows of an arena from their mean, and sums of their products; see offset_gram."""

from __future__ import annotations

from ._launch import tl, triton
from ._rows import load_row


@triton.jit
def offsets_of(
    params_ptr, means_ptr, first, row_stride, p, start, stop, N: tl.constexpr, COUNT: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Offsets of COUNT rows from ``first`` on; the last row, and one too many, is expert 0.

    means_ptr None: these are all experts but number 0.
    """
    origin = load_row(params_ptr, p, start, stop, ACC, ROWS, LANES, WIDE)
    d = ()
    for i in tl.static_range(COUNT):
        expert = tl.where(first + i + 1 < N, first + i + 1, 0)
        row_ptr = params_ptr + expert * row_stride
        d += (load_row(row_ptr, p, start, stop, ACC, ROWS, LANES, WIDE) - origin,)
    if means_ptr is None:
        mean = d[0]
        for i in tl.static_range(1, COUNT):
            mean = mean + d[i]
        mean = mean * tl.full((1, 1), 1 / N, ACC)
    else:
        mean = load_row(means_ptr, p, start, stop, ACC, ROWS, LANES, WIDE)
    offsets = ()
    for i in tl.static_range(COUNT):
        offsets += (d[i] - mean,)
    return offsets


@triton.jit
def add_products(sums, d, e, COUNT: tl.constexpr, SAME: tl.constexpr):
    """sums + d_i and + d_i e_j, i <= j, if SAME; + d_i e_j otherwise. LANES become one number."""
    added = ()
    if SAME:
        for i in tl.static_range(COUNT):
            added += (sums[i] + tl.sum(d[i], 1),)
        for j in tl.static_range(COUNT):
            for i in tl.static_range(j + 1):
                added += (sums[COUNT + j * (j + 1) // 2 + i] + tl.sum(d[i] * e[j], 1),)
    else:
        for j in tl.static_range(COUNT):
            for i in tl.static_range(COUNT):
                added += (sums[j * COUNT + i] + tl.sum(d[i] * e[j], 1),)
    return added


@triton.jit
def add_columns(
    sums, params_ptr, means_ptr, a, b, row_stride, p, start, stop, N: tl.constexpr,
    COUNT: tl.constexpr, SAME: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``sums`` plus what ROWS * LANES columns from p on add."""
    d = offsets_of(
        params_ptr, means_ptr, a, row_stride, p, start, stop, N, COUNT, ACC, ROWS, LANES, WIDE
    )
    if SAME:
        return add_products(sums, d, d, COUNT, SAME)
    e = offsets_of(
        params_ptr, means_ptr, b, row_stride, p, start, stop, N, COUNT, ACC, ROWS, LANES, WIDE
    )
    return add_products(sums, d, e, COUNT, SAME)

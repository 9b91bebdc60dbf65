"""Sums of rows of experts, weighted by the coefficients of one merged model."""

from __future__ import annotations

from ._launch import tl, triton


@triton.jit
def weighted(w, term):
    """``w * term``, and zero where w is zero: such an expert takes no part, not even its NaN."""
    return tl.where(w == 0, 0.0, w * term)


@triton.jit
def mixed(coef_ptr, coef_step, first_ptr, row_stride, columns, mask, N, ACC: tl.constexpr):
    """sum_i w_i * row_i[columns] in type ACC, in expert order.

    N is no constant: all loads at once would take more registers than wide rows leave.
    """
    total = tl.zeros(columns.shape, ACC)
    i = N * 0
    while i < N:  # the interpreter's range() refuses kernel arguments since numpy 2.4
        w = tl.load(coef_ptr + i * coef_step).to(ACC)
        row = first_ptr + i * row_stride
        total += weighted(w, tl.load(row + columns, mask=mask, other=0.0).to(ACC))
        i += 1
    return total

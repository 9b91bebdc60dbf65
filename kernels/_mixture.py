"""Sums of rows of experts, weighted by the coefficients of one merged model."""

from __future__ import annotations

from ._launch import tl, triton
from ._rows import load_experts


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


@triton.jit
def mixed_held(
    held, coefs, coef_step, first_ptr, row_stride, place, mask,
    ACC: tl.constexpr, N: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The same for a constant N, with the first HELD rows at hand: they serve several models. The
    others are loaded by eights."""
    total = weighted(tl.load(coefs).to(ACC), held[0].to(ACC))
    for j in tl.static_range(1, HELD):
        total += weighted(tl.load(coefs + j * coef_step).to(ACC), held[j].to(ACC))
    for first in range(HELD, N, 8):
        others = load_experts(first_ptr + first * row_stride, row_stride, place, mask, 8)
        for j in tl.static_range(8):
            w = tl.load(coefs + (first + j) * coef_step).to(ACC)
            total += weighted(w, others[j].to(ACC))
    return total

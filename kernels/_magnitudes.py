"""Magnitudes as integers of the same order; see magnitude_histogram."""

from __future__ import annotations

from ._launch import tl, triton


@triton.jit
def load_keys(params_ptr, base_ptr, expert, columns, P, row_stride):
    """The bits of |params - base| without the sign, int32 (int64 for fp64); -1 for NaN and for what
    is past the row. ``expert`` and ``columns`` int64."""
    inside = columns < P
    x = tl.load(params_ptr + expert * row_stride + columns, mask=inside, other=0.0)
    if params_ptr.dtype.element_ty.is_fp64():
        if base_ptr is not None:
            x = x - tl.load(base_ptr + columns, mask=inside, other=0.0)
        bits = x.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
        return tl.where(inside & (bits <= 0x7FF0000000000000), bits, -1)
    else:
        x = x.to(tl.float32)
        if base_ptr is not None:
            x = x - tl.load(base_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        return tl.where(inside & (bits <= 0x7F800000), bits, -1)

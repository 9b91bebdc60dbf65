"""Which segment a column belongs to, found on the device: bounds are never read on the host."""

from __future__ import annotations

from ._launch import tl, triton


def search_steps(segments: int) -> int:
    """How many halvings find one of ``segments`` segments."""
    return max(segments - 1, 0).bit_length()


@triton.jit
def find_segment(bounds_ptr, target, S, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The last segment s < S that begins at or before ``target`` (int64); 0 if none does.

    A segment begins at column bounds[s], or, when BLOCK is not 0, at slot bounds[s] // BLOCK + s
    (see blend_weight_grad). bounds (S+1,) int64, ascending. Only bounds 1 .. S-1 decide, so that
    whatever they hold the answer is a valid index. STEPS = search_steps(S); each reads one bound.
    """
    low = target * 0
    if STEPS > 0:
        high = low + (S - 1)
        for _ in range(STEPS):
            middle = (low + high) // 2
            begin = tl.load(bounds_ptr + middle + 1)
            if BLOCK > 0:
                begin = begin // BLOCK + middle + 1
            right = (low < high) & (begin <= target)
            high = tl.where(right, high, middle)
            low = tl.where(right, middle + 1, low)
    return low

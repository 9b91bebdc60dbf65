"""Which segment a column belongs to, found on the device: bounds are never read on the host."""

from __future__ import annotations

from ._launch import tl, triton


def search_steps(segments: int) -> int:
    """How many steps of 32 ways find one of ``segments`` segments."""
    steps = 0
    while 32**steps < segments:
        steps += 1
    return steps


@triton.jit
def find_segment(bounds_ptr, target, S, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """The last segment s < S that begins at or before ``target`` (int64); 0 if none does.

    A segment begins at column bounds[s], or, when BLOCK is not 0, at slot bounds[s] // BLOCK + s
    (see blend_weight_grad). bounds (S+1,) int64, ascending. Only bounds 1 .. S-1 decide, and
    whatever they hold the answer is a valid index. STEPS = search_steps(S); each step is one load
    of 32 bounds, where halving would wait for one bound after the other.
    """
    low = target * 0
    if STEPS > 0:
        more = low + (S - 1)  # the answer is in low .. low + more
        ways = tl.arange(0, 32) + 1
        for _ in range(STEPS):
            stride = tl.maximum((more + 31) // 32, 1)
            ahead = ways * stride
            begin = tl.load(bounds_ptr + low + ahead, mask=ahead <= more, other=0)
            if BLOCK > 0:
                begin = begin // BLOCK + low + ahead
            passed = tl.sum(((ahead <= more) & (begin <= target)).to(tl.int64)) * stride
            low += passed
            more = tl.minimum(more - passed, stride - 1)
    return low

"""What drops elements of task vectors; see neulig_fast/ops/_task_vectors.py."""

from __future__ import annotations

from ._launch import tl, triton


@triton.jit
def _halves(seed, place, top, stream):
    """Halves of words of places (int64); ``top`` is put into the counters' upper words."""
    counter = place // 64 * 8 + place % 16 // 2
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32) | tl.full((), top, tl.uint32)
    like = tl.zeros_like(low)
    first, last = stream.to(tl.uint32) + like, (stream >> 32).to(tl.uint32) + like
    w0, w1, w2, w3 = tl.philox(seed, low, high, first, last, 7)
    w = place % 64 // 16
    word = tl.where(w < 2, tl.where(w == 0, w0, w1), tl.where(w == 2, w2, w3))
    return ((word >> (place % 2 * 16).to(tl.uint32)) & 0xFFFF).to(tl.int64)


@triton.jit
def drawn(seed, place, stream, share):
    """Whether the words of places (int64) are below ``share``, at most 2^32."""
    upper = _halves(seed, place, 0, stream)
    kept = upper < share >> 16
    tied = (upper == share >> 16) & ((share & 0xFFFF) > 0)
    if tl.max(tied.to(tl.int32), 0) > 0:  # seldom
        lower = _halves(seed, place, 0x80000000, stream)
        kept = kept | (tied & (lower < (share & 0xFFFF)))
    return kept


@triton.jit
def task_vector(
    x, base, i, numbers_ptr, places_ptr, lanes, start, seed, N: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Expert i's scaled task vector, and where it is dropped."""
    v = x.to(base.dtype) - base
    dropped = tl.zeros(v.shape, tl.int1)
    magnitude = tl.abs(v)
    if RULE & 1:
        bound = tl.load(numbers_ptr + 2 * N + i)
        before = start + lanes < tl.load(places_ptr + i)
        dropped = dropped | (magnitude < bound) | ((magnitude == bound) & (before == 0))
    if RULE & 2:
        bound = tl.load(numbers_ptr + 3 * N + i)
        before = start + lanes < tl.load(places_ptr + N + i)
        dropped = dropped | (magnitude > bound) | ((magnitude == bound) & before)
    if RULE & 4:
        stream = tl.load(places_ptr + 3 * N + i)
        share = tl.load(places_ptr + 2 * N + i)
        dropped = dropped | (drawn(seed, start + lanes, stream, share) == 0)
    if RULE & 8:
        v = v * tl.load(numbers_ptr + N + i)
    return v, dropped

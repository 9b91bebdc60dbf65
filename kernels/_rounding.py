"""Between fp32 and narrower types in integer arithmetic; the bits of neulig_fast/ops/_rounding.py.

fp8 is loaded and stored as bytes: sm_80 has no e4m3, and casts of the interpreter differ.
"""

from __future__ import annotations

import torch

from ._launch import tl, triton

FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
NARROW = {torch.bfloat16: "bf16", torch.float16: "fp16", **FP8}


def as_stored(tensor: torch.Tensor, *, codes: bool = False) -> torch.Tensor:
    """``tensor`` as a kernel takes it: fp8, or with ``codes`` every narrow type, as integers."""
    if tensor.dtype in FP8:
        return tensor.view(torch.uint8)
    return tensor.view(torch.int16) if codes else tensor


@triton.jit
def widen(x, ACC: tl.constexpr, FORMAT: tl.constexpr):
    """Loaded values in the type they are summed in. FORMAT: of fp8 bytes, or ""."""
    if FORMAT == "e5m2":  # the upper byte of an fp16
        return (x.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "e4m3":  # in fp16's place the exponent is 8 too small; the largest code is NaN
        magnitude = (x & 0x7F).to(tl.uint16)
        placed = ((x & 0x80).to(tl.uint16) << 8) | (magnitude << 7)
        value = placed.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where(magnitude == 0x7F, float("nan"), value)
    else:
        return x.to(ACC)


@triton.jit
def _finish(code, x, LARGEST: tl.constexpr, NAN: tl.constexpr, BITS: tl.constexpr):
    """A magnitude's code, not above the largest, NaN for NaN, with the sign of ``x``."""
    sign = (x.to(tl.uint32, bitcast=True) >> 31) << (BITS - 1)
    code = tl.where(code > LARGEST, LARGEST, code) | sign
    return tl.where(x != x, NAN, code)


@triton.jit
def _nearest(
    x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr, NAN: tl.constexpr
):
    """fp32 to an fp8 code, to nearest even; subnormals are rounded by an addition."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    MAGIC: tl.constexpr = (151 - BIAS - MANTISSA) << 23
    magnitude = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    even = ((magnitude >> DROPPED) & 1) + ((1 << (DROPPED - 1)) - 1)
    normal = ((magnitude + even) >> DROPPED) - ((127 - BIAS) << MANTISSA)
    added = magnitude.to(tl.float32, bitcast=True) + 2.0 ** (24 - BIAS - MANTISSA)
    code = tl.where(
        magnitude < ((128 - BIAS) << 23), added.to(tl.uint32, bitcast=True) - MAGIC, normal
    )
    return _finish(code, x, LARGEST, NAN, 8)


@triton.jit
def _stochastic(
    x, random, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr,
    NAN: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """fp32 to a code: the bits below the last place plus as many random bits carry or do not."""
    magnitude = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    field = magnitude >> 23
    small = magnitude < ((128 - BIAS) << 23)
    exponent = tl.where(field == 0, 1, field)
    hidden = tl.where(field == 0, 0, 1 << 23)
    dropped = tl.where(small, (151 - BIAS - MANTISSA) - exponent, 23 - MANTISSA)
    excess = tl.where(dropped > 31, dropped - 31, 0)  # bits that cannot matter
    significand = ((magnitude & 0x7FFFFF) | hidden) >> tl.where(excess > 31, 31, excess)
    kept = tl.where(small, significand, magnitude)
    dropped = tl.where(dropped > 31, 31, dropped)
    code = (kept + (random >> (32 - dropped))) >> dropped
    code = code - tl.where(small, 0, (127 - BIAS) << MANTISSA)
    return _finish(code, x, LARGEST, NAN, BITS)


@triton.jit
def encode(x, OUT: tl.constexpr):
    """fp32 as fp8 codes, to nearest even."""
    if OUT == "e4m3":
        return _nearest(x, 3, 7, 0x7E, 0x7F)
    else:
        return _nearest(x, 2, 15, 0x7B, 0x7F)


@triton.jit
def encode_randomly(x, random, OUT: tl.constexpr):
    """fp32 as codes of a narrow type, up or down as the words decide."""
    if OUT == "bf16":
        return _stochastic(x, random, 7, 127, 0x7F80, 0x7FC0, 16)
    elif OUT == "fp16":
        return _stochastic(x, random, 10, 15, 0x7C00, 0x7E00, 16)
    elif OUT == "e4m3":
        return _stochastic(x, random, 3, 7, 0x7E, 0x7F, 8)
    else:
        return _stochastic(x, random, 2, 15, 0x7B, 0x7F, 8)


@triton.jit
def random_words(seed, column, segment, output):
    """The words of columns (int64, counted from the start of their segment) of an output row."""
    group = column // 4
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    like = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(
        seed, low, high, segment.to(tl.uint32) + like, output.to(tl.uint32) + like
    )
    place = column % 4
    return tl.where(place < 2, tl.where(place == 0, w0, w1), tl.where(place == 2, w2, w3))

"""How a result becomes the type it is stored in: the reference that every backend's bits follow.

To nearest even, or, with a seed, stochastically: a value between two neighbours of the target
becomes the upper one with the probability of its distance from the lower one, so that the mean is
kept. fp8 saturates: what lies beyond the largest finite value, infinity included, becomes it. A
fp64 value is first rounded to fp32 for every target narrower than that.

The random word of an element is a pure function of the seed, its output row k, its segment s and
its column o counted from the segment's start: Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel
random numbers: as easy as 1, 2, 3", SC 2011) with the seed as key and (o // 4, s, k) as counter
yields four words, of which it takes number o mod 4. A tensor thus gets the same bits alone and in
an arena, and on every backend.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _checks


class Format(NamedTuple):
    """A float type in bits, the sign apart: code ``largest`` is what too large values become."""

    mantissa: int
    bias: int
    largest: int
    nan: int


FORMATS = {
    torch.bfloat16: Format(7, 127, 0x7F80, 0x7FC0),
    torch.float16: Format(10, 15, 0x7C00, 0x7E00),
    torch.float8_e4m3fn: Format(3, 7, 0x7E, 0x7F),
    torch.float8_e5m2: Format(2, 15, 0x7B, 0x7F),
}
_WORD = 0xFFFFFFFF


def faults(out_dtype: torch.dtype, rounding_seed: int | None) -> list[str]:
    """What is wrong with the type of an output and how to round to it."""
    if out_dtype not in _checks.STORED_DTYPES:
        return [f"the output must be {_checks.STORED}, got {out_dtype}"]
    if rounding_seed is not None and out_dtype not in FORMATS:
        return [f"rounding_seed: nothing to round in {out_dtype}; it is for bf16, fp16 and fp8"]
    return []


def check_types(op: str, out_dtype: object, seed: object = None) -> None:
    """TypeError for an ``out_dtype`` that is no dtype; so for a seed that is no 64-bit integer."""
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"{op}: out_dtype must be a torch.dtype, got {out_dtype!r}")
    if seed is None:
        return
    if not isinstance(seed, (int, torch.SymInt)):
        raise TypeError(f"{op}: rounding_seed must be an integer, got {seed!r}")
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"{op}: rounding_seed must be a signed 64-bit integer, got {seed}")


def round_to(value: Tensor, dtype: torch.dtype, seed: int | None, segment: int) -> Tensor:
    """``value`` (P,) or (K, P), the columns of one segment, as ``dtype``."""
    if dtype not in FORMATS:
        return value.to(dtype)
    value = value.to(torch.float32)
    if seed is not None:
        return stochastic(value, dtype, words(seed, value, segment))
    if dtype in _checks.FP8_DTYPES:
        limit = torch.finfo(dtype).max
        value = torch.where(value.isnan(), float("nan"), value.clamp(-limit, limit))
    return value.to(dtype)


def stochastic(value: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """fp32 ``value`` as ``dtype``, up or down as the 32-bit words ``random`` (int64) decide.

    The d bits below the target's last place, plus d random bits, carry or do not. Where d would be
    more than 31, deep in the target's subnormals, bits that cannot matter are dropped.
    """
    mantissa, bias, largest, nan = FORMATS[dtype]
    bits = value.contiguous().view(torch.int32).to(torch.int64)
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude >> 23).clamp(min=1)
    normal = magnitude >= (128 - bias) << 23
    significand = (magnitude & 0x7FFFFF) | torch.where(magnitude >> 23 > 0, 1 << 23, 0)
    dropped = torch.where(normal, 23 - mantissa, 151 - bias - mantissa - exponent)
    kept = torch.where(normal, magnitude, significand >> (dropped - 31).clamp(0, 31))
    dropped = dropped.clamp(max=31)
    code = (kept + (random >> (32 - dropped))) >> dropped
    code = (code - torch.where(normal, (127 - bias) << mantissa, 0)).clamp(max=largest)
    code = torch.where(value.isnan(), nan, code | ((bits >> 31) & 1) << (8 * dtype.itemsize - 1))
    return code.to(torch.int16 if dtype.itemsize == 2 else torch.uint8).view(dtype)


def words(seed: int, like: Tensor, segment: int, first: int = 0) -> Tensor:
    """The random words (int64) of the columns of a segment, (P,) or (K, P) as ``like``, whose
    rows are outputs ``first`` and on."""
    column = torch.arange(like.shape[-1], device=like.device)
    rows = like.shape[0] if like.ndim == 2 else 1
    output = first + torch.arange(rows, device=like.device)[:, None]
    group = column // 4
    counter = (group & _WORD, group >> 32, torch.full_like(column, segment), output)
    four = torch.stack(philox(seed, *torch.broadcast_tensors(*counter)))
    return four.gather(0, (column % 4).expand(1, rows, -1)).view(like.shape)


def philox(seed: int, *counter: Tensor, rounds: int = 10) -> list[Tensor]:
    """Philox4x32: four words (int64 tensors) from a 64-bit key and four counter words."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(rounds):
        left, right = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # modulo 2^64: all bits of the product
        c0, c1 = (right >> 32 & _WORD) ^ c1 ^ k0, right & _WORD
        c2, c3 = (left >> 32 & _WORD) ^ c3 ^ k1, left & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]

"""magnitude_histogram: one pass of an exact search for a magnitude, digit by digit.

    counts[i, v] = #{p : digit(|params[i, p] - base[p]|) = v, and the bits above it are prefix[i]}

The bits of a magnitude without its sign, 31 of fp32, are an integer of the same order, cut here
into digits of 11, 10 and 10 bits (fp64: 63 into 11, 11, 11, 10, 10 and 10). Counts of tiles, on any
machines, add up. From those of digit 0 follows which value of it the k-th largest magnitude has;
that is the prefix of the pass over digit 1, and so on: `magnitude_select` of what never lies in
one memory. ``neulig_fast.methods._selection`` has the arithmetic. NaN is not counted.

Numerics: differences in fp32 (fp64 for fp64); counts are exact and the same on every backend.

Traffic: N * P values and base read once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._registry import Op
from . import _arena, _magnitudes
from ._digits import BINS

_BLOCK = 1 << 16  # columns whose keys are in memory at once


def magnitude_histogram(
    params: Tensor, prefix: Tensor, digit: int, base: Tensor | None = None
) -> Tensor:
    """How often every value of a digit occurs in the magnitudes of each expert's task vector.

    Args:
        params: (N, P), one row per expert: fp32, bf16, fp16 or fp64.
        prefix: (N,) int64, the bits above the digit: 0 for digit 0. What no magnitude has, such as
            -1, counts nothing.
        digit: 0 to 2, or 0 to 5 for fp64; 0 is the uppermost.
        base: (P,) in params' dtype, what task vectors start from; None is zero.

    Returns:
        (N, 2048) int64. Digits of 10 bits leave the upper half zero.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes, devices or a digit that do not fit, all of them listed.
    """
    given = {} if base is None else {"base": base}
    _checks.check_tensors("magnitude_histogram", params=params, prefix=prefix, **given)
    if not isinstance(digit, (int, torch.SymInt)):
        raise TypeError(f"magnitude_histogram: digit must be an int, got {digit!r}")
    return OP(params, prefix, digit, base)


def _faults(params: Tensor, prefix: Tensor, digit: int, base: Tensor | None = None) -> list[str]:
    found = _magnitudes.faults(params, base, prefix=prefix)
    last = len(_magnitudes.digits(params.dtype)) - 1
    if not 0 <= digit <= last:
        found.append(f"digit must be 0 to {last} for {params.dtype}, got {digit}")
    return found


def magnitude_histogram_reference(
    params: Tensor, prefix: Tensor, digit: int, base: Tensor | None = None
) -> Tensor:
    """By sorting out and counting row by row, a block of columns at a time."""
    shift, width = _magnitudes.digits(params.dtype)[digit]
    counts = _fake(params, prefix, digit, base).zero_()
    for left in range(0, params.shape[1], _BLOCK):
        columns = slice(left, left + _BLOCK)
        start = None if base is None else base[columns]
        for row, above, count in zip(params[:, columns], prefix, counts, strict=True):
            keys = _magnitudes.keys(row, start)
            keys = keys[(keys >= 0) & (keys >> (shift + width) == above)]
            count += torch.bincount(keys >> shift & (1 << width) - 1, minlength=BINS)
    return counts


def _fake(params: Tensor, prefix: Tensor, digit: int, base: Tensor | None = None) -> Tensor:
    return prefix.new_empty(params.shape[0], BINS)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=27)
    yield draw.normal(3, 17), draw.bounds(0, 0, 0), 0, draw.normal(17)
    params = draw.normal(3, 1025)[:, 3:]
    shift, width = _magnitudes.digits(dtype)[1]
    above = _magnitudes.keys(params[:, 100], None) >> (shift + width)
    above[1] = -1
    yield params, above, 1, None
    yield draw.normal(2, 300).round(), draw.bounds(0, 0), 2, draw.normal(300).round()
    yield draw.normal(2, 0), draw.bounds(0, 3), 1, None
    yield draw.normal(1, 1), draw.bounds(1 << 40), 2, draw.normal(1)


def _prepare(
    params: Tensor, prefix: Tensor, digit: int, base: Tensor | None = None
) -> tuple[Any, ...]:
    return params, prefix.contiguous(), digit, base


OP = Op(
    "magnitude_histogram",
    "(Tensor params, Tensor prefix, int digit, Tensor? base=None) -> Tensor",
    reference=magnitude_histogram_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "magnitude_histogram"),
    elementwise=True,
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", prepare=_prepare, why_not=lambda p, x, d, b=None: _arena.why_not_with(p, b))
OP.add_triton(prepare=_prepare)

"""What magnitude_select and magnitude_histogram share: magnitudes of differences, their bits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from . import _arena
from ._digits import DIGITS, Digit


def magnitudes(row: Tensor, base: Tensor | None) -> Tensor:
    """``|row - base|`` in fp32, or in fp64 for fp64."""
    acc = _checks.accumulation_dtype(row.dtype)
    return (row.to(acc) if base is None else row.to(acc) - base.to(acc)).abs()


def keys(row: Tensor, base: Tensor | None) -> Tensor:
    """The bits of the magnitudes as int64 of the same order; -1 for NaN."""
    d = magnitudes(row, base)
    bits = d.view(torch.int64 if d.dtype == torch.float64 else torch.int32).long()
    return bits.masked_fill(d.isnan(), -1)


def digits(dtype: torch.dtype) -> tuple[Digit, ...]:
    """The digits of magnitudes of parameters of this type."""
    return DIGITS[8 * _checks.accumulation_dtype(dtype).itemsize]


def faults(params: Tensor, base: Tensor | None, **integers: Tensor) -> list[str]:
    """What is wrong with the form of ``params``, ``base`` and (N,) integers of each expert."""
    found = _arena.faults(params)
    for name, tensor in integers.items():
        found += _checks.layout_faults(name, tensor)
        if params.ndim == 2 and tensor.shape != params.shape[:1]:
            wanted = _checks.shape(params.shape[:1])
            found.append(f"{name} must be (N,) = {wanted}, got {_checks.shape(tensor)}")
        if tensor.dtype != torch.int64:
            found.append(f"{name} must be int64, got {tensor.dtype}")
        if tensor.device != params.device:
            found.append(f"{name} must be on {params.device} like params, got {tensor.device}")
    return found + _arena.base_faults(params, base)

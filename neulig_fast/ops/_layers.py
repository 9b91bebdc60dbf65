"""What the layers of N experts share: checks of weight (N, ...), bias and coefficients."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from .. import _checks


def weight_faults(x: Tensor, weight: Tensor, bias: Tensor | None, rank: int) -> list[str]:
    """What is wrong with a layer's tensors beside their sizes.

    Args:
        rank: of ``weight``, (N, O, I) or (N, D); ``bias`` is (N, O) or (N, D).
    """
    found = []
    if x.dtype not in _checks.FLOAT_DTYPES:
        found.append(f"x must be fp32, bf16, fp16 or fp64, got {x.dtype}")
    form, out = ("(N, O, I)", "(N, O)") if rank == 3 else ("(N, D)", "(N, D)")
    if weight.ndim != rank or weight.shape[0] < 1:
        found.append(f"weight must be {form} with N >= 1, got {_checks.shape(weight)}")
    elif bias is not None and bias.shape != weight.shape[:2]:
        wanted = _checks.shape(weight.shape[:2])
        found.append(f"bias must be {out} = {wanted}, got {_checks.shape(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            found.append(f"{name} must be {x.dtype} like x, got {tensor.dtype}")
        if tensor.device != x.device:
            found.append(f"{name} must be on {x.device} like x, got {tensor.device}")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            found += _checks.layout_faults(name, tensor)
    return found


def width_faults(x: Tensor, letter: str, weight: Tensor) -> list[str]:
    """What is wrong with the length, called ``letter``, of x's rows."""
    if not x.ndim or weight.ndim < 2 or x.shape[-1] == weight.shape[-1]:
        return []
    return [f"x must have rows of length {letter} = {weight.shape[-1]}, got {x.shape[-1]}"]


def coef_faults(x: Tensor, weight: Tensor, coef: Tensor) -> list[str]:
    """What is wrong with coefficients (B, N) of inputs (B, T, I)."""
    found = _checks.layout_faults("coef", coef)
    if not coef.is_floating_point():
        found.append(f"coef must be floating point, got {coef.dtype}")
    if coef.device != x.device:
        found.append(f"coef must be on {x.device} like x, got {coef.device}")
    if coef.ndim != 2:
        found.append(f"coef must be (B, N) or (N,), got {_checks.shape(coef)}")
        return found
    # Of coefficients (N,) a row was made, so their shape is not what the caller knows.
    if weight.ndim and coef.shape[1] != weight.shape[0]:
        wanted = f"a value for each of N = {weight.shape[0]} experts"
        found.append(f"coef must have {wanted}, got {coef.shape[1]}")
    if x.ndim and coef.shape[0] != x.shape[0]:
        wanted = f"a row for each of B = {x.shape[0]} samples"
        found.append(f"coef must have {wanted}, got {coef.shape[0]}")
    return found


def why_not(x: Tensor, weight: Tensor, bias: Tensor | None = None, *_: object) -> str | None:
    """What fast backends ask of a layer's tensors: rows without gaps."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name}: rows are not contiguous (stride {tensor.stride(-1)})"
    return None


def triton(op: str) -> Callable[..., Any]:
    """The op's Triton launcher: unlike the native twin, it makes its results itself."""

    def run(*args: Any) -> Any:
        return getattr(importlib.import_module(f"neulig_fast.kernels.{op}"), op)(*args)

    return run


def like(tensor: Tensor, name: str, x: Tensor) -> Iterator[str]:
    """What is wrong with a tensor that has to be of x's shape, dtype and device."""
    if tensor.shape != x.shape:
        yield f"{name} must be {_checks.shape(x)} like x, got {_checks.shape(tensor)}"
    if tensor.dtype != x.dtype or tensor.device != x.device:
        yield f"{name} must be {x.dtype} on {x.device} like x, got {tensor.dtype}, {tensor.device}"


def weighted(w: Tensor, term: Tensor) -> Tensor:
    """``w * term``, and zero where w is zero: such an expert takes no part, not even its NaN."""
    return w * taking_part(w, term)


def taking_part(w: Tensor, term: Tensor) -> Tensor:
    """``term`` as it may be multiplied by w: finite where w is zero."""
    return term.masked_fill((w == 0) & ~term.isfinite(), 0)

"""What the ops over the arena share: params (N, P) and column segments.

Segments are an int64 tensor of boundaries, (S + 1,), ascending from 0 to P: segment s covers the
columns [segments[s], segments[s + 1]).
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch

from .. import _checks
from .._registry import OPS
from ..segments import Segments

MAX_GPU_EXPERTS = 64  # as csrc/cuda/bindings.h and kernels/_launch.py have it


def boundaries(
    op: str, segments: torch.Tensor | Sequence[int] | Segments | None, params: torch.Tensor
) -> torch.Tensor | None:
    """``segments`` in any accepted form as boundaries on the device of ``params``.

    Raises:
        TypeError: boundaries that are not integers.
        ValueError: boundaries in Python that do not ascend from 0 to P.
    """
    if segments is None or isinstance(segments, torch.Tensor):
        return segments
    if isinstance(segments, Segments):
        if params.ndim == 2 and segments.width != params.shape[1]:
            raise ValueError(
                f"{op}: segments are of rows of {segments.width}, params have P = {params.shape[1]}"
            )
        return segments.bounds_on(params.device)
    try:
        bounds = [operator.index(bound) for bound in segments]
    except TypeError as error:
        raise TypeError(f"{op}: segments must be a sequence of integers: {error}") from None
    if params.ndim == 2 and bounds:
        _check_ascent(op, bounds, params.shape[1])
    return torch.tensor(bounds, dtype=torch.int64, device=params.device)


def faults(
    params: torch.Tensor, segments: torch.Tensor | None = None, *, fp8: bool = False
) -> list[str]:
    """What is wrong with the form of ``params`` and ``segments``: rank, dtype, device, layout."""
    found = _checks.layout_faults("params", params)
    if params.ndim != 2 or params.shape[0] < 1:
        found.append(f"params must be (N, P) with N >= 1, got {_checks.shape(params)}")
    if params.dtype not in (_checks.STORED_DTYPES if fp8 else _checks.FLOAT_DTYPES):
        stored = _checks.STORED if fp8 else "fp32, bf16, fp16 or fp64"
        found.append(f"params must be {stored}, got {params.dtype}")
    if segments is None:
        return found
    found += _checks.layout_faults("segments", segments)
    if segments.ndim != 1 or segments.shape[0] < 1:
        found.append(f"segments must be (S + 1,) boundaries, got {_checks.shape(segments)}")
    if segments.dtype != torch.int64:
        found.append(f"segments must be int64, got {segments.dtype}")
    if segments.device != params.device:
        found.append(f"segments must be on {params.device} like params, got {segments.device}")
    return found


def base_faults(params: torch.Tensor, base: torch.Tensor | None) -> list[str]:
    """What is wrong with the form of a row that is subtracted from all others."""
    if base is None:
        return []
    found = _checks.layout_faults("base", base)
    if params.ndim == 2 and base.shape != params.shape[1:]:
        wanted = _checks.shape(params.shape[1:])
        found.append(f"base must be (P,) = {wanted}, got {_checks.shape(base)}")
    if base.dtype != params.dtype:
        found.append(f"base must be {params.dtype} like params, got {base.dtype}")
    if base.device != params.device:
        found.append(f"base must be on {params.device} like params, got {base.device}")
    return found


def weight_faults(
    weights: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> list[str]:
    """What is wrong with the form of a blend's ``weights``: shape, dtype, device, layout."""
    found = _checks.layout_faults("weights", weights)
    if not weights.is_floating_point():
        found.append(f"weights must be floating point, got {weights.dtype}")
    if weights.device != params.device:
        found.append(f"weights must be on {params.device} like params, got {weights.device}")
    if params.ndim == 2:
        n, s = params.shape[0], 0 if segments is None else segments.numel() - 1
        tail = (n,) if segments is None else (s, n)
        if weights.ndim not in (len(tail), len(tail) + 1) or weights.shape[-len(tail) :] != tail:
            forms = "(N,) or (K, N), with segments (S, N) or (K, S, N)"
            sizes = f"N = {n}" if segments is None else f"N = {n}, S = {s}"
            found.append(f"weights must be {forms}, here {sizes}; got {_checks.shape(weights)}")
    return found


def check_values(op: str, params: torch.Tensor, segments: torch.Tensor | None) -> None:
    """ValueError unless the boundaries ascend from 0 to P. Reads values: for the CPU only."""
    if segments is not None:
        _check_ascent(op, segments.tolist(), params.shape[1])


def _check_ascent(op: str, bounds: list[int], width: int) -> None:
    if bounds[0] != 0 or bounds[-1] != width or any(a > b for a, b in pairwise(bounds)):
        shown = ", ".join(map(str, bounds[:8])) + (", ..." if len(bounds) > 8 else "")
        raise ValueError(f"{op}: segments must ascend from 0 to P = {width}, got [{shown}]")


def slices(segments: torch.Tensor) -> list[tuple[int, int]]:
    """``[(start, stop), ...]`` of every segment."""
    return list(pairwise(segments.tolist()))


def contiguous(segments: torch.Tensor | None) -> torch.Tensor | None:
    """The boundaries as kernels read them."""
    return None if segments is None else segments.contiguous()


def why_not(rows: torch.Tensor) -> str | None:
    """What every fast backend asks of a matrix of rows (or one row); None when it has it."""
    if rows.shape[-1] > 1 and rows.stride(-1) != 1:
        return f"columns are not contiguous (stride {rows.stride(-1)})"
    return None


def why_not_with(params: torch.Tensor, base: torch.Tensor | None) -> str | None:
    """The same of ``params`` and ``base``."""
    if (reason := why_not(params)) is not None:
        return reason
    if base is not None and (reason := why_not(base)) is not None:
        return f"base's {reason}"
    return None


def why_not_cuda(params: torch.Tensor) -> str | None:
    """What the CUDA C++ kernels ask of ``params`` beyond that."""
    if params.shape[0] > MAX_GPU_EXPERTS:
        return f"{params.shape[0]} experts, more than {MAX_GPU_EXPERTS}"
    return why_not(params)


def check_alignment(op: str, *args: Any) -> None:
    """ValueError for a tensor on a GPU that no kernel there could read.

    The fault would come later, in words of the driver, and end the process's use of the device.
    """
    if args[0].is_cuda:
        _checks.raise_all(op, misaligned(OPS[op].arguments, args))


def misaligned(names: Iterable[str], args: Iterable[Any]) -> list[str]:
    """Tensors that do not start at a multiple of the size of their items, by name."""
    return [
        f"{name} starts at an address that is not a multiple of its item size, {x.itemsize} bytes"
        for name, x in zip(names, args, strict=False)
        if isinstance(x, torch.Tensor) and x.data_ptr() % x.itemsize
    ]


def other_dtype(dtype: torch.dtype) -> torch.dtype:
    """A type for samples whose result is not stored as the parameters are; fp64 stays exact."""
    return torch.float16 if dtype == torch.float32 else torch.promote_types(dtype, torch.float32)


class Draw:
    """Seeded sample tensors on one device."""

    def __init__(self, device: torch.device | str, dtype: torch.dtype, seed: int) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal values, drawn on the CPU so that every device sees the same."""
        return torch.randn(shape, generator=self.generator, device="cpu").to(
            self.device, self.dtype
        )

    def bounds(self, *values: int) -> torch.Tensor:
        """Segment boundaries."""
        return torch.tensor(values, device=self.device)

"""Column segments at op level: an int64 tensor of boundaries, (S + 1,), from 0 up to P."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from .. import _checks

if TYPE_CHECKING:
    from ..segments import Segments


def boundaries(
    segments: torch.Tensor | Sequence[int] | Segments | None, params: torch.Tensor
) -> torch.Tensor | None:
    """``segments`` in any accepted form as boundaries on the device of ``params``."""
    if segments is None or isinstance(segments, torch.Tensor):
        return segments
    if hasattr(segments, "bounds_on"):
        return segments.bounds_on(params.device)
    return torch.tensor(list(segments), dtype=torch.int64, device=params.device)


def faults(segments: torch.Tensor | None, params: torch.Tensor) -> list[str]:
    """What is wrong with the form of ``segments``: rank, dtype, device."""
    if segments is None:
        return []
    found = []
    if segments.ndim != 1 or segments.shape[0] < 1:
        found.append(f"segments must be (S + 1,) boundaries, got {_checks.shape(segments)}")
    if segments.dtype != torch.int64:
        found.append(f"segments must be int64, got {segments.dtype}")
    if segments.device != params.device:
        found.append(f"segments must be on {params.device} like params, got {segments.device}")
    return found


def check_values(op: str, segments: torch.Tensor | None, width: int) -> None:
    """ValueError unless the boundaries ascend from 0 to ``width``. Reads values: CPU only."""
    if segments is None:
        return
    first, last = int(segments[0]), int(segments[-1])
    if first != 0 or last != width or bool((segments.diff() < 0).any()):
        raise ValueError(
            f"{op}: segments must ascend from 0 to P = {width}, got {segments.tolist()[:8]}"
            + (" ..." if segments.numel() > 8 else "")
        )


def slices(segments: torch.Tensor) -> list[tuple[int, int]]:
    """``[(start, stop), ...]`` of every segment."""
    return list(pairwise(segments.tolist()))

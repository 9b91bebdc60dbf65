"""``mergekit.sparsify:sparsify`` with mergekit's arithmetic, but with less sorting.

Which of several equal magnitudes are kept mergekit leaves to an unstable sort; here it is those of
the smaller index. DELLA's ranks come from mergekit's own sort, and its draws from torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...methods._kept import restoring
from ...ops import magnitude_select, merge_task_vectors
from .._seam import Unsupported
from .._tensors import check_alike, check_finite
from ._rows import word


def sparsify(
    tensor: Tensor,
    density: float,
    method: Any,
    gamma: float = 0,
    epsilon: float = 0,
    rescale_norm: Any = None,
) -> Tensor:
    """The largest elements, the largest but for some, or some drawn by their ranks."""
    dropping, rescale = word(method), word(rescale_norm) == "l1"
    if word(rescale_norm) not in (None, "l1") or dropping == "random":
        raise Unsupported("draws of torch, or another norm than l1")
    check_alike([tensor])
    if density >= 1:
        return tensor
    if not density > 0 or gamma < 0:
        raise Unsupported("settings out of bounds")
    if dropping == "della_magprune":
        return _della(tensor, density, epsilon, rescale)
    check_finite(tensor)
    wanted, n = int(density * tensor.numel()), tensor.numel()
    if dropping == "magnitude":
        masked = _between(tensor, 0, max(1, wanted))
    else:
        masked = _between(tensor, min(int(gamma * n), n - wanted), wanted)
    return _rescaled(tensor, masked) if rescale else masked


def _between(tensor: Tensor, dropped: int, wanted: int) -> Tensor:
    """The ``wanted`` largest that are left without the ``dropped`` largest, and 0 elsewhere, with
    the signs that products with 0 have."""
    if tensor.is_cpu and tensor.dtype == torch.float64:
        raise Unsupported("fp64, which mergekit ranks in fp32")
    row, out = tensor.view(1, -1), torch.empty_like(tensor)
    rule: dict[str, Tensor] = {}
    rule["lower"], rule["lower_cut"] = _select(row, dropped + wanted)
    if dropped:
        rule["upper"], rule["upper_cut"] = _select(row, dropped)
    one = torch.ones(1, device=row.device)
    merge_task_vectors(row, one, out=out.view(-1), **rule)
    return out.copysign_(tensor)


def _select(row: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return magnitude_select(row, torch.tensor([count], device=row.device))


def _rescaled(tensor: Tensor, masked: Tensor) -> Tensor:
    """With the sum of magnitudes that there was before, as torch adds them up."""
    return masked.mul_(restoring(tensor.abs().sum(), masked.abs().sum()))


def _della(tensor: Tensor, density: float, epsilon: float, rescale: bool) -> Tensor:
    """Kept with chances from density - epsilon to density + epsilon, by the rank in a row."""
    if tensor.ndim not in (1, 2) or tensor.shape[-1] < 2:
        raise Unsupported("DELLA of tensors that are no rows of two and more elements")
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise Unsupported("settings out of bounds: epsilon")
    in_fp32 = tensor.is_cpu and tensor.dtype != torch.bfloat16
    rows = tensor.view(-1, tensor.shape[-1])
    order = rows.abs().argsort(dim=1)
    rows = rows.to(torch.float32) if in_fp32 else rows
    # What is computed of ranks is computed once, and not for every row.
    ranks = torch.arange(rows.shape[1], device=rows.device).to(rows.dtype) + 1
    place = ((ranks - ranks[0]) / (ranks.max() - ranks[0])).clamp(0, 1)
    chances = (density - epsilon) + place * 2 * epsilon
    drawn = torch.empty_like(rows).scatter_(1, order, chances.expand_as(rows))
    masked = torch.bernoulli(drawn).mul_(rows)
    return (_rescaled(rows, masked) if rescale else masked).to(tensor.dtype).view(tensor.shape)

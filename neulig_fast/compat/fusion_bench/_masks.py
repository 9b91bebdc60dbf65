"""Masks and draws: EMR-Merging (arXiv 2405.17461), TALL masks (2405.07813), DARE (2311.03099)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.merge_task_vectors import merge_task_vectors
from .._seam import Seam, Unsupported
from .._tensors import check_finite, check_plain
from ._tensors import as_lists, check_wide, same_names

_TILE = 1 << 16  # columns whose temporaries stay in cache


def seams() -> list[Seam]:
    """One function of each method."""
    method = "fusion_bench.method"
    return [
        Seam(f"{method}.emr_merging.utils:emr_merge", _emr(exact=True), _emr(exact=False)),
        Seam(f"{method}.tall_mask.utils:generate_task_masks", tall_masks, tall_masks),
        Seam(f"{method}.dare.utils:param_random_drop_", None, random_drop_),
    ]


# -- EMR ------------------------------------------------------------------------------------------


def _emr(exact: bool) -> Callable[..., Any]:
    def emr_merge(
        task_vectors: Sequence[Mapping[str, Tensor]],
    ) -> tuple[dict[str, Tensor], dict[str, list[Tensor]], Tensor]:
        names = same_names(task_vectors)
        lists = as_lists([[vector[name] for name in names] for vector in task_vectors])
        if exact:
            check_wide(lists.flat)
        if lists.device is None or lists.device.type != "cpu":
            raise Unsupported("tensors that are not on the CPU")
        buffers: dict[torch.dtype, Tensor] = {}
        unified, masks = {}, {}
        before, after = torch.zeros(len(task_vectors)), torch.zeros(len(task_vectors))
        for name, *tensors in zip(names, *lists.lists, strict=True):
            whole, own = _elected(_rows(tensors, buffers))
            magnitudes = whole.abs()
            unified[name] = whole.view(tensors[0].shape)
            masks[name] = [mask.view(tensors[0].shape) for mask in own]
            for i, (tensor, mask) in enumerate(zip(tensors, own, strict=True)):
                before[i] += tensor.abs().mean()
                after[i] += (magnitudes * mask).mean()
        return unified, masks, before / after

    return emr_merge


def _rows(tensors: Sequence[Tensor], buffers: dict[torch.dtype, Tensor]) -> Tensor:
    """(N, P), in memory that is used again for tensors that are no larger."""
    first, count = tensors[0], len(tensors)
    buffer = buffers.get(first.dtype)
    if buffer is None or buffer.numel() < count * first.numel():
        buffer = buffers[first.dtype] = first.new_empty(count * first.numel())
    rows = buffer[: count * first.numel()].view(count, first.numel())
    return torch.stack([tensor.flatten() for tensor in tensors], out=rows)


def _elected(rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The largest magnitudes with the sign of the sum, and who has that sign."""
    ones = torch.ones(len(rows), device=rows.device)
    whole = merge_task_vectors(rows, ones, elect="sum", zero_sign=-1, combine="max")
    check_finite(whole)
    whole.neg_().add_(0.0).neg_()  # zeros are negative to the original
    signs = whole.sign()
    return whole, [row * signs > 0 for row in rows]


# -- TALL -----------------------------------------------------------------------------------------


def tall_masks(
    tv_flat_checks: Tensor,
    flat_ft: Tensor,
    flat_ptm: Tensor,
    tv: Tensor | None = None,
    tall_mask_lambda: float = 1.0,
) -> Tensor:
    """(N, P): where a model is further from the base than, lambda times, from the merged one."""
    if tv is None:
        raise Unsupported("no merged task vector")
    check_plain(flat_ft, flat_ptm, tv)
    if flat_ft.ndim != 2 or len(flat_ft) < 2 or flat_ft.shape[1] < 2:
        raise Unsupported("models that are not (N, P) with more than one of each")
    width = flat_ft.shape[1:]
    if flat_ptm.shape != width or tv.shape != width:
        raise Unsupported("vectors of another shape than the models'")
    mask = torch.empty(flat_ft.shape, dtype=torch.bool, device=flat_ft.device)
    for a in range(0, mask.shape[1], _TILE):
        base, models = flat_ptm[a : a + _TILE], flat_ft[:, a : a + _TILE]
        merged = base + tv[a : a + _TILE]
        for i, model in enumerate(models):
            far = (merged - model).abs_() * tall_mask_lambda
            torch.gt((base - model).abs_(), far, out=mask[i, a : a + _TILE])
    return mask


# -- DARE -----------------------------------------------------------------------------------------


def random_drop_(param: Tensor, sparsity_level: float, rescale: bool) -> None:
    """Elements dropped by draws of their own, with a seed from PyTorch's generator."""
    check_plain(param.data if isinstance(param, Tensor) else param)
    if not isinstance(sparsity_level, (int, float)) or not 0 <= sparsity_level < 1:
        raise Unsupported("a share to drop that is not in [0, 1)")
    check_finite(param.data)
    keep = 1 - sparsity_level
    one = torch.ones(1, device=param.device, dtype=torch.float64)
    param.data = merge_task_vectors(
        param.data.view(1, -1),
        one,
        scales=one / keep if rescale else one,
        density=one * keep,
        seed=int(torch.randint(2**62, ())),
    ).view(param.shape)

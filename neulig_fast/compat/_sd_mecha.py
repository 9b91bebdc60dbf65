"""sd-mecha: what ``nf.patch("sd_mecha")`` replaces, key by key, in whatever thread asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from ..ops import magnitude_select, merge_task_vectors
from ._seam import Host, Seam, Unsupported
from ._tensors import check_alike, check_finite

_IN_ORDER = 4  # sums of so many terms torch forms from the first to the last
_FAR = 1e37  # from the largest finite number


def ties_sum(*models: Tensor, k: float = 1.0, vote_sgn: bool = False) -> Tensor:
    """``ties.ties_sum``: of deltas, the mean of those that have the elected sign.

    Elements below the k n-th largest magnitude are dropped, ties of it kept. ``vote_sgn``: signs
    are elected by sums, else by counts; a tie is 0. The result is fp32 at least.
    """
    check_alike(models)
    check_finite(*models, below=_FAR)
    if not 0 <= k <= 1:
        raise Unsupported("a share k beyond 0 and 1")
    return elected_sum(models, k, vote_sgn)


def elected_sum(models: Sequence[Tensor], k: float, vote_sgn: bool) -> Tensor:
    """The same of any tensors of one form, contiguous; NaN has no rank."""
    rows = torch.stack([model.view(-1) for model in models])
    merged = merge_task_vectors(
        rows,
        torch.ones(len(rows), device=rows.device),
        lower=_thresholds(rows, k),
        elect="sum" if vote_sgn else "count",
        zero_sign=0,
        divide="count",
        out_dtype=torch.promote_types(rows.dtype, torch.float32),
    )
    return merged.view(models[0].shape)


def ties_sum_exact(*models: Tensor, k: float = 1.0, vote_sgn: bool = False) -> Tensor:
    """The same where it is sd-mecha's arithmetic: sums in order, in fp32."""
    if len(models) > _IN_ORDER:
        raise Unsupported(f"more than {_IN_ORDER} models, added up in torch's order")
    check_alike(models)
    if models[0].dtype == torch.float64:
        raise Unsupported("fp64, which sd-mecha ranks in fp32")
    return ties_sum(*models, k=k, vote_sgn=vote_sgn)


def filter_top_k(a: Tensor, k: float) -> Tensor:
    """``ties.filter_top_k``: 0 below the k n-th largest magnitude."""
    check_alike([a])
    if a.dtype == torch.float64:
        raise Unsupported("fp64, which sd-mecha ranks in fp32")
    check_finite(a, below=_FAR)
    if not 0 <= k <= 1:
        raise Unsupported("a share k beyond 0 and 1")
    (threshold,) = _thresholds(a.view(1, -1), k)
    return a * (a.abs() >= threshold).float()


def _thresholds(rows: Tensor, k: float) -> Tensor:
    """(N,): of each row the least magnitude that is kept."""
    n = rows.shape[1]
    wanted = n + 1 - max(int((1 - k) * n), 1)
    counts = torch.full((len(rows),), wanted, device=rows.device)
    return magnitude_select(rows, counts).thresholds


_TIES = "sd_mecha.extensions.builtin.merge_methods.ties"


def _seams() -> list[Seam]:
    return [
        Seam(f"{_TIES}:ties_sum.__wrapped__", ties_sum_exact, ties_sum),
        Seam(f"{_TIES}:filter_top_k", filter_top_k, filter_top_k),
    ]


HOST = Host("sd_mecha", "sd_mecha", SpecifierSet("==1.1.8"), _seams)

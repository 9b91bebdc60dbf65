"""TIES-Merging (arXiv 2306.01708) on whole models as vectors, as FusionBench has it.

Kept are the int(K d) + 1 largest magnitudes of a task vector and whatever equals the last of them;
signs are elected by unweighted sums; where a sum is zero the majority of all elected signs counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...ops.magnitude_select import magnitude_select
from ...ops.merge_task_vectors import merge_task_vectors
from .._seam import Seam, Unsupported
from .._tensors import check_finite, check_plain
from ._tensors import check_wide, same_names

_IN_ORDER = 16  # rows of which PyTorch makes one sum, not a sum of sums
_DIVIDE = {"sum": "none", "mean": "count", "max": "none"}


def seams() -> list[Seam]:
    """The merge, its first step, and the way to a vector and back."""
    utils = "fusion_bench.method.ties_merging.ties_merging_utils"
    return [
        Seam(f"{utils}:ties_merging", _merging(exact=True), _merging(exact=False)),
        Seam(f"{utils}:topk_values_mask", topk_values_mask, topk_values_mask),
        Seam(f"{utils}:state_dict_to_vector", to_vector, to_vector),
        Seam(f"{utils}:vector_to_state_dict", from_vector, from_vector),
    ]


def _merging(exact: bool) -> Callable[..., Tensor]:
    def ties_merging(
        flat_task_checks: Tensor, reset_thresh: Any = None, merge_func: str = ""
    ) -> Tensor:
        how = str(merge_func).split("-")[-1]
        _check(flat_task_checks)
        if how not in _DIVIDE:
            raise Unsupported("an unknown merge_func")
        if exact and len(flat_task_checks) > _IN_ORDER:
            raise Unsupported("more models than the original adds in order")
        if exact and how == "mean":
            check_wide([flat_task_checks])
        return _merged(flat_task_checks, _thresholds(flat_task_checks, reset_thresh), how)

    return ties_merging


def _merged(rows: Tensor, lower: Tensor, how: str) -> Tensor:
    ones = torch.ones(len(rows), device=rows.device)
    majority = float(merge_task_vectors(rows, ones, lower=lower).sign_().sum())
    # Where the sum is zero the original takes positive elements for a positive majority, negative
    # ones for any other; and multiplies the largest of them by the majority, which may be zero.
    zero_sign = 1 if majority > 0 else 0 if majority == 0 and how == "max" else -1
    merged = merge_task_vectors(
        rows, ones, lower=lower, elect="sum", zero_sign=zero_sign, divide=_DIVIDE[how],
        combine="max" if how == "max" else "sum",
        out_dtype=torch.promote_types(rows.dtype, torch.float32) if how == "mean" else None,
    )  # fmt: skip
    check_finite(merged)  # what is not is ranked otherwise by the original
    if how == "max" and majority < 0:
        merged.neg_().add_(0.0).neg_()  # a zero becomes a negative one
    return merged


def topk_values_mask(M: Tensor, K: float = 0.7, return_mask: bool = False) -> tuple[Tensor, ...]:
    """The values kept, zeros elsewhere; the share that is kept, by row; the mask."""
    _check(M)
    mask = M.abs() >= _thresholds(M, K)[:, None]
    if M.isnan().any():
        raise Unsupported("values that are not finite")
    kept = M * mask, mask.float().mean(dim=1)
    return (*kept, mask) if return_mask else kept


def _check(rows: Tensor) -> None:
    check_plain(rows)
    if rows.ndim != 2 or 0 in rows.shape or 1 in rows.shape[1:]:
        raise Unsupported("task vectors that are not (N, P) with P > 1, or empty")


def _thresholds(rows: Tensor, share: Any) -> Tensor:
    """(N,): the smallest magnitude that each row keeps."""
    if not isinstance(share, (int, float)):
        raise Unsupported("a threshold that is no number")
    width = rows.shape[1]
    most = int(width * (share / 100 if share > 1 else share)) + 1
    if not 1 <= most < width:
        raise Unsupported("a threshold that keeps all or less than nothing")
    counts = torch.full((len(rows),), most, device=rows.device)
    lower = magnitude_select(rows, counts).thresholds
    if not (lower >= 0).all():  # -1: fewer numbers than asked for, the rest NaN
        raise Unsupported("values that are not finite")
    return lower.to(rows.dtype)  # a magnitude of its own


# -- vectors --------------------------------------------------------------------------------------


def to_vector(state_dict: Any, remove_keys: Sequence[str] = ()) -> Tensor:
    """All tensors in one, in the order of their names. The original copies them all before."""
    names = _names(state_dict, remove_keys)
    return nn.utils.parameters_to_vector([state_dict[name].reshape(-1) for name in names])


def from_vector(vector: Tensor, state_dict: Any, remove_keys: Sequence[str] = ()) -> Any:
    """Views of ``vector`` in the shapes of a state dict, by name. The original makes them of a
    copy of the state dict."""
    names = _names(state_dict, remove_keys)
    check_plain(vector)
    used = [state_dict[name] for name in names]
    if vector.ndim != 1 or len({*map(id, used)}) < len(used):
        raise Unsupported("a vector of another form, or tied parameters")
    if sum(x.numel() for x in used) > vector.numel():
        raise Unsupported("a vector that is too short")
    if any((x.dtype, x.device) != (vector.dtype, vector.device) for x in used):
        raise Unsupported("tensors of several dtypes, or on several devices")
    found, start = OrderedDict(), 0
    for name in names:
        like = state_dict[name]
        view = vector[start : start + like.numel()].view(like.shape)
        parameter = isinstance(like, nn.Parameter)
        found[name] = nn.Parameter(view, like.requires_grad) if parameter else view
        start += like.numel()
    if "transformer.shared.weight" in found:  # T5's, which ties the embeddings that were removed
        found.update(dict.fromkeys(remove_keys, found["transformer.shared.weight"]))
    return found


def _names(state_dict: Any, remove_keys: Sequence[str]) -> list[str]:
    same_names([state_dict])
    if remove_keys is None:
        raise Unsupported("no list of keys")
    names = sorted(state_dict.keys() - set(remove_keys))
    check_plain(*(state_dict[name] for name in names))
    return names

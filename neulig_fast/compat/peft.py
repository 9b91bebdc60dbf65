"""peft: merges of adapters' tensors in one pass, and ``svd`` without the dense matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from .. import _checks
from .._autograd import has_tangent
from ..ops import blend_lists, magnitude_select, merge_task_vectors
from ._peft_svd import svd_adapter
from ._seam import Host, Seam, Unsupported
from ._tensors import check_alike, check_finite, check_ranked

_ELECTIONS = {"total": "sum", "frequency": "count"}
# The host adds up to so many tensors one after the other, more of them by fours in some columns.
_IN_ORDER = 4
# Elements of all tensors of a weighted sum below which a table of their addresses costs more than
# it saves.
SMALL = 1 << 20


# -- what is taken ---------------------------------------------------------------------------------


def _take_list(tensors: Any, weights: Any) -> torch.dtype:
    """Unsupported for what the fused ops do not take; else the type of the host's result."""
    if not isinstance(tensors, (list, tuple)) or not tensors:
        raise Unsupported("no list of tensors")
    check_alike(tensors, strided=True)
    if not isinstance(weights, Tensor) or weights.shape != (len(tensors),):
        raise Unsupported("weights that are not one number per tensor")
    if weights.device != tensors[0].device or weights.dtype.is_complex:
        raise Unsupported("weights of another device, or complex ones")
    if has_tangent(weights) or (weights.requires_grad and torch.is_grad_enabled()):
        raise Unsupported("a gradient to the weights")
    dtype = torch.promote_types(tensors[0].dtype, weights.dtype)
    if dtype not in (tensors[0].dtype, torch.float32):
        raise Unsupported(f"{weights.dtype} weights of {tensors[0].dtype} tensors")
    return dtype


def _take_density(density: Any, random: bool = False) -> None:
    """Unsupported for a share of elements at which the host warns and keeps all, or raises."""
    if not isinstance(density, (int, float)) or not 0 <= density < 1:
        raise Unsupported("a density that is not between 0 and 1")
    if random and density == 0:
        raise Unsupported("a density of 0, by which the host divides")


def _election(method: Any) -> str:
    if method not in _ELECTIONS:
        raise Unsupported("an unknown way to elect a sign")
    return _ELECTIONS[method]


def _take_exactly(tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Unsupported where the host's arithmetic is not determined, or other than ours."""
    if tensors[0].device.type != "cpu":
        raise Unsupported("exact parity is known on CPUs only")
    if len(tensors) > _IN_ORDER:
        raise Unsupported(f"more than {_IN_ORDER} tensors, which torch sums in another order")
    if dtype.itemsize == 2:
        raise Unsupported(f"arithmetic in {dtype}")
    check_finite(*tensors)


# -- the merges ------------------------------------------------------------------------------------


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    """(N, P), without a copy of one tensor."""
    if len(tensors) == 1:
        return tensors[0].detach().reshape(1, -1)
    return torch.stack([tensor.detach().reshape(-1) for tensor in tensors])


def _largest(rows: Tensor, density: float, exactly: bool) -> dict[str, Any]:
    """The bounds that the int(density * P) largest elements of every row pass."""
    kept = torch.full((len(rows),), int(density * rows.shape[1]), device=rows.device)
    thresholds, cuts = magnitude_select(rows, kept)
    if exactly:
        for row, bound, cut in zip(rows, thresholds.to(rows.dtype), cuts.tolist(), strict=True):
            if bound > 0 and cut and bool((row[cut:].abs() == bound).any()):
                raise Unsupported("ties at the threshold, whose order is topk's secret")
    return {"lower": thresholds, "lower_cut": cuts}


def _draws(density: float, rows: Tensor) -> dict[str, Any]:
    """Random masks of a share ``density``, whose seed torch's generator draws."""
    share = torch.full((len(rows),), density, dtype=torch.float64, device=rows.device)
    seed = int(torch.randint(2**62, ()))
    return {"density": share, "scales": share.reciprocal(), "seed": seed}


def _merged(
    rows: Tensor, weights: Tensor, like: Tensor, dtype: torch.dtype, **rules: Any
) -> Tensor:
    merged = merge_task_vectors(
        rows, weights.detach().to(_checks.accumulation_dtype(rows.dtype)), out_dtype=dtype, **rules
    )
    if "lower" in rules:
        check_ranked(merged)
    return merged.view(like.shape)


def _task_arithmetic(exactly: bool) -> Callable[..., Tensor]:
    def task_arithmetic(task_tensors: list[Tensor], weights: Tensor) -> Tensor:
        dtype = _take_list(task_tensors, weights)
        if len(task_tensors) * task_tensors[0].numel() < SMALL:
            raise Unsupported("a weighted sum of small tensors, where nothing is gained")
        if exactly:
            _take_exactly(task_tensors, dtype)
        factors = weights.detach().to(_checks.accumulation_dtype(dtype))
        lists = [[tensor.detach().contiguous()] for tensor in task_tensors]
        (merged,) = blend_lists(factors, lists, dtype)
        return merged.add_(0.0) if exactly else merged  # the host's sums of negative zeros are 0

    return task_arithmetic


def _magnitude_prune(exactly: bool) -> Callable[..., Tensor]:
    def magnitude_prune(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
        dtype = _take_list(task_tensors, weights)
        _take_density(density)
        if exactly:
            _take_exactly(task_tensors, dtype)
        rows = _rows(task_tensors)
        bounds = _largest(rows, density, exactly)
        return _merged(rows, weights, task_tensors[0], dtype, **bounds)

    return magnitude_prune


def _ties(exactly: bool) -> Callable[..., Tensor]:
    def ties(
        task_tensors: list[Tensor],
        weights: Tensor,
        density: float,
        majority_sign_method: str = "total",
    ) -> Tensor:
        dtype = _take_list(task_tensors, weights)
        rules = {"elect": _election(majority_sign_method), "divide": "count"}
        _take_density(density)
        if exactly:
            _take_exactly(task_tensors, dtype)
        dtype = torch.promote_types(dtype, torch.float32)  # of the counts that it divides by
        rows = _rows(task_tensors)
        bounds = _largest(rows, density, exactly)
        return _merged(rows, weights, task_tensors[0], dtype, **rules, **bounds)

    return ties


def dare_linear(task_tensors: list[Tensor], weights: Tensor, density: float) -> Tensor:
    """DARE with random masks of our own."""
    dtype = _take_list(task_tensors, weights)
    _take_density(density, random=True)
    rows = _rows(task_tensors)
    return _merged(rows, weights, task_tensors[0], dtype, **_draws(density, rows))


def dare_ties(
    task_tensors: list[Tensor],
    weights: Tensor,
    density: float,
    majority_sign_method: str = "total",
) -> Tensor:
    """DARE with an election, with random masks of our own."""
    dtype = _take_list(task_tensors, weights)
    rules = {"elect": _election(majority_sign_method), "divide": "count"}
    _take_density(density, random=True)
    dtype = torch.promote_types(dtype, torch.float32)  # of the counts that it divides by
    rows = _rows(task_tensors)
    return _merged(rows, weights, task_tensors[0], dtype, **rules, **_draws(density, rows))


# -- their parts -----------------------------------------------------------------------------------


def _magnitude_based_pruning(exactly: bool) -> Callable[..., Tensor]:
    def magnitude_based_pruning(tensor: Tensor, density: float) -> Tensor:
        check_alike([tensor], strided=True)
        _take_density(density)
        if exactly:
            _take_exactly([tensor], torch.float32)  # there is no arithmetic
        rows = _rows([tensor])
        bounds = _largest(rows, density, exactly)
        one = torch.ones(1, device=tensor.device)
        kept = _merged(rows, one, tensor, tensor.dtype, **bounds)
        return kept.copysign(tensor) if exactly else kept  # what is dropped keeps its sign there

    return magnitude_based_pruning


def random_pruning(tensor: Tensor, density: float, rescale: bool) -> Tensor:
    """With a random mask of our own."""
    check_alike([tensor], strided=True)
    _take_density(density, random=True)
    rows = _rows([tensor])
    draws = _draws(density, rows)
    if not rescale:
        del draws["scales"]
    return _merged(rows, torch.ones(1, device=tensor.device), tensor, tensor.dtype, **draws)


def seams() -> tuple[Seam, ...]:
    """All of them."""
    where = "peft.utils.merge_utils:"
    pairs = {
        "task_arithmetic": _task_arithmetic,
        "magnitude_prune": _magnitude_prune,
        "ties": _ties,
        "magnitude_based_pruning": _magnitude_based_pruning,
    }
    method = "LoraModel._svd_generalized_task_arithmetic_weighted_adapter"
    return (
        *(Seam(where + name, make(True), make(False)) for name, make in pairs.items()),
        Seam(f"{where}random_pruning", None, random_pruning),
        Seam(f"{where}dare_linear", None, dare_linear),
        Seam(f"{where}dare_ties", None, dare_ties),
        Seam(f"peft.tuners.lora.model:{method}", None, svd_adapter),
    )


HOST = Host("peft", "peft", SpecifierSet(">=0.21,<0.22"), seams)

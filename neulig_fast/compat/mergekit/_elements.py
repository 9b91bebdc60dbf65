"""mergekit's methods that weigh every element of its own: linear, SCE, RAM, NearSwap."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..._checks import accumulation_dtype
from ...methods import BLOCK, METHODS, Task
from ...ops import blend_lists_, magnitude_select, merge_task_vectors
from .._seam import Unsupported
from .._tensors import check_alike
from ._rows import blocks, merged

_LEAST = 1e-6  # of weights: below it mergekit's SCE divides by this, and weighs all alike


def linear(batch: Any, weight: Tensor, normalize: bool = True) -> Tensor:
    """``linear``: for each place along the first axis a weighted mean, or sum."""
    check_alike(batch.tensors)
    shares = weight.double()
    if normalize:
        shares = shares / shares.sum(dim=1, keepdim=True)
    if not shares.isfinite().all():
        raise Unsupported("weights that sum to zero")
    out = torch.empty_like(batch.tensors[0])
    blend_lists_([*out], shares, [[*tensor] for tensor in batch.tensors])
    return out


# -- in blocks ------------------------------------------------------------------------------------


def in_blocks(original: Callable[..., Tensor], wide: bool = False) -> Callable[..., Tensor]:
    """mergekit's own arithmetic, on blocks that the caches hold. ``wide``: in the type of sums,
    rounded once."""

    @functools.wraps(original)
    def merge(group: Any, *args: Any, **kwargs: Any) -> Tensor:
        check_alike(group.tensors)
        out = torch.empty_like(group.tensors[0])
        flat = [tensor.view(-1) for tensor in group.tensors]
        kind = _sums(out) if wide else out.dtype
        for block in blocks(out.numel(), BLOCK):
            entries = tuple(
                replace(entry, tensor=tensor[block].to(kind))
                for entry, tensor in zip(group.entries, flat, strict=True)
            )
            out.view(-1)[block] = original(replace(group, entries=entries), *args, **kwargs)
        return out

    return merge


def in_columns(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """mergekit's majority of signs, likewise: all of its arithmetic is along the first axis."""

    @functools.wraps(original)
    def get_mask(delta: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_alike([delta])
        if delta.ndim < 2:
            raise Unsupported("no axis but that of the models")
        rows = delta.view(len(delta), -1)
        mask = torch.empty_like(rows, dtype=torch.bool)
        for block in blocks(rows.shape[1], BLOCK):
            mask[:, block] = original(rows[:, block], *args, **kwargs)
        return mask.view(delta.shape)

    return get_mask


# -- RAM ------------------------------------------------------------------------------------------


def ram(group: Any, epsilon: float = 1e-5) -> Tensor:
    """``ram``: the mean of the task vectors that are not next to zero."""
    tensors, method = _opened(group), METHODS["ram"]
    if any(method.parameters["epsilon"].faults(epsilon)):
        raise Unsupported("settings out of bounds: epsilon")
    shape = (tensors[0].numel(),)
    return merged(method, Task("", shape, len(tensors) - 1, True, {"epsilon": epsilon}), tensors)


def _opened(group: Any) -> list[Tensor]:
    """The experts' tensors, then the base's."""
    check_alike(group.tensors)
    if not group.non_base:
        raise Unsupported("no experts")
    return [*(entry.tensor for entry in group.non_base), group.base.tensor]


# -- SCE ------------------------------------------------------------------------------------------


def sce(group: Any, int8_mask: bool = False, select_topk: float = 1.0) -> Tensor:
    """``sce``: select by variance, weigh by energy, erase what disagrees with the sum's sign."""
    del int8_mask  # the type of a mask that nothing here has
    tensors = _opened(group)
    if not select_topk > 0:
        raise Unsupported("no elements are selected")
    kept = _varied(tensors, select_topk) if select_topk < 1 else None
    energies = torch.zeros(len(tensors) - 1, dtype=torch.float64, device=tensors[0].device)
    for _, _, d in _task_vectors(tensors, kept):
        energies += d.square_().sum(1)
    weights = _shares(energies / tensors[0].numel())
    out = torch.empty_like(tensors[0])
    for part, base, d in _task_vectors(tensors, kept):
        change = merge_task_vectors(d, weights, elect="sum", divide="weights")
        out.view(-1)[part] = change.add_(base)
    return out


def _shares(energies: Tensor) -> Tensor:
    total = energies.sum()
    if abs(total) < _LEAST:
        return torch.full_like(energies, 1 / len(energies))
    weights = energies / total
    if not weights.min() >= _LEAST:
        raise Unsupported("an expert that weighs next to nothing, or NaN")
    return weights


def _varied(tensors: list[Tensor], share: float) -> Tensor:
    """(P,) bool: the share of the elements that vary at all whose variance is largest."""
    variance = tensors[0].new_empty(tensors[0].numel(), dtype=_sums(tensors[0]))
    for part, _, d in _task_vectors(tensors):
        variance[part] = d.sub_(d.mean(0)).square_().mean(0)
    if not variance.max().isfinite():
        raise Unsupported("values that are not finite")
    count = int(int(variance.count_nonzero()) * share)
    wanted = torch.tensor([count], device=variance.device)
    (threshold,), (cut,) = magnitude_select(variance[None], wanted)
    kept = variance > threshold
    kept[:cut] |= variance[:cut] == threshold
    return kept


def _task_vectors(
    tensors: list[Tensor], kept: Tensor | None = None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Block by block: its place, the base (P,) and task vectors (N, P), in the type of sums, 0
    where elements are not ``kept``."""
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, len(flat[0]), BLOCK):
        part = slice(start, min(start + BLOCK, len(flat[0])))
        wide = torch.stack([row[part] for row in flat]).to(_sums(flat[0]))
        d = wide[:-1].sub_(wide[-1])
        yield part, wide[-1], d if kept is None else d.mul_(kept[part])


def _sums(tensor: Tensor) -> torch.dtype:
    return accumulation_dtype(tensor.dtype)

"""Lists of sharded tensors, such as the parameters of N fully sharded modules.

Any placement that gives each rank elements of its own will do, since no element of a blend needs
another; a position has the same placements in every list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ._sharded import Layout, is_dtensor, shown, watched, weight_faults, whole

Lists = Sequence[Sequence[Tensor]]


def any_dtensor(lists: Iterable[Iterable[Tensor]]) -> bool:
    """Whether a tensor of the lists is a DTensor."""
    return any(is_dtensor(*tensors) for tensors in lists)


def blend_lists(
    run: Callable[..., Sequence[Tensor]], weights: Tensor, lists: Lists, *options: Any
) -> list[Tensor]:
    """T blended tensors, each placed as its position is, from N lists of T.

    Args:
        run: ``run(weights, lists, *options)``, the op on plain tensors. It is called once for
            positions that are cut along the same dimensions of a mesh: nearly always once.
        weights: (N,) or (T, N), plain or Replicate. Their gradient is whole on every rank.

    Raises:
        ValueError: placements that differ between experts or are sums not yet reduced.
    """
    _checks.raise_all("blend_lists", [*weight_faults(weights), *_faults(lists)])
    weights = whole(weights)
    if weights.requires_grad and not torch.compiler.is_compiling():
        weights = watched(weights, *(x for xs in lists for x in xs if not x.is_inference()))
    results: list[Any] = [None] * len(lists[0])
    for layout, positions in _alike(lists[0]):
        w = weights if weights.ndim == 1 else weights[positions]
        w = w if layout is None else layout.replicated(w)
        shards = [[whole(tensors[t]) for t in positions] for tensors in lists]
        for t, result in zip(positions, run(w, shards, *options), strict=True):
            like = lists[0][t]
            results[t] = Layout.of(like).wrap(result) if is_dtensor(like) else result
    return results


def shards(
    name: str, weights: Tensor, outputs: Sequence[Tensor], lists: Lists
) -> tuple[Tensor, list[Tensor], list[list[Tensor]]]:
    """The arguments as this rank's plain tensors, for an op that reduces nothing.

    Raises:
        ValueError: as :func:`blend_lists`.
    """
    _checks.raise_all(name, [*weight_faults(weights), *_faults(lists, outputs)])
    local = [[whole(tensor) for tensor in tensors] for tensors in (outputs, *lists)]
    return whole(weights), local[0], local[1:]


def _alike(tensors: Sequence[Tensor]) -> Iterator[tuple[Layout | None, list[int]]]:
    """Positions whose weights' gradients are summed over the same ranks, with one's layout."""
    found: dict[Any, tuple[Layout | None, list[int]]] = {}
    for t, tensor in enumerate(tensors):
        layout = Layout.of(tensor) if is_dtensor(tensor) else None
        key = (layout.mesh, layout.split) if layout is not None and layout.split else None
        found.setdefault(key, (layout, []))[1].append(t)
    yield from found.values()


def _faults(lists: Lists, outputs: Sequence[Tensor] | None = None) -> Iterator[str]:
    named = {f"expert {i}": tensors for i, tensors in enumerate(lists)}
    if outputs is not None:
        named["outputs"] = outputs
    for owner, tensors in named.items():
        for t, (tensor, first) in enumerate(zip(tensors, lists[0], strict=True)):
            if _place(tensor) != _place(first):
                place = f"placed as {_said(tensor)}, expert 0 as {_said(first)}"
                yield f"{owner}, position {t}: {place}"
    for t, first in enumerate(lists[0]):
        if is_dtensor(first) and any(p.is_partial() for p in first.placements):
            yield f"position {t}: sums not yet reduced, {_said(first)}; redistribute them"


def _place(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tuple(tensor.placements)) if is_dtensor(tensor) else None


def _said(tensor: Tensor) -> str:
    return shown(tensor.placements) if is_dtensor(tensor) else "a plain tensor"

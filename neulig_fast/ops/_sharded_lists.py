"""Lists of sharded tensors, such as the parameters of N fully sharded modules.

Any placement that gives each rank elements of its own will do, since no element of a blend needs
another; a position has the same placements in every list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .. import _checks
from ._sharded import Layout, is_dtensor, shown, weight_faults, whole

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
    results: list[Any] = [None] * len(lists[0])
    for layout, positions in _alike(lists[0]):
        w = weights if weights.ndim == 1 else weights[positions]
        w = w if layout is None else layout.replicated(w)
        shards = [[whole(tensors[t]) for t in positions] for tensors in lists]
        for t, result in zip(positions, run(w, shards, *options), strict=True):
            like = lists[0][t]
            results[t] = Layout.of(like).wrap(result) if is_dtensor(like) else result
    return results


def shards(name: str, weights: Tensor, *lists: Sequence[Tensor]) -> tuple[Tensor, list[Any]]:
    """The weights and the lists as this rank's plain tensors, for an op that reduces nothing.

    Raises:
        ValueError: as :func:`blend_lists`.
    """
    _checks.raise_all(name, [*weight_faults(weights), *_faults(lists)])
    return whole(weights), [[whole(tensor) for tensor in tensors] for tensors in lists]


def _alike(tensors: Sequence[Tensor]) -> Iterator[tuple[Layout | None, list[int]]]:
    """Positions whose weights' gradients are summed over the same ranks, with one's layout."""
    found: dict[Any, tuple[Layout | None, list[int]]] = {}
    for t, tensor in enumerate(tensors):
        layout = Layout.of(tensor) if is_dtensor(tensor) else None
        key = (layout.mesh, layout.split) if layout is not None and layout.split else None
        found.setdefault(key, (layout, []))[1].append(t)
    yield from found.values()


def _faults(lists: Lists) -> Iterator[str]:
    for t, tensors in enumerate(zip(*lists, strict=True)):
        first = _place(tensors[0])
        for i, tensor in enumerate(tensors[1:], start=1):
            if _place(tensor) != first:
                yield (
                    f"expert {i}, position {t}: placed as {_said(tensor)}, "
                    f"expert 0 as {_said(tensors[0])}"
                )
        if is_dtensor(tensors[0]) and any(p.is_partial() for p in tensors[0].placements):
            yield f"position {t}: sums not yet reduced, {_said(tensors[0])}; redistribute them"


def _place(tensor: Tensor) -> Any:
    return (tensor.device_mesh, tuple(tensor.placements)) if is_dtensor(tensor) else None


def _said(tensor: Tensor) -> str:
    return shown(tensor.placements) if is_dtensor(tensor) else "a plain tensor"

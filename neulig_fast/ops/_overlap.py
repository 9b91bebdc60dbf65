"""Whether tensors to be written share memory with each other or with what is read."""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor


class Span(NamedTuple):
    """The memory of one tensor: bytes ``start`` to ``stop`` of ``memory``.

    ``position`` is that in the list ``owner``; None: the owner is the tensor.
    """

    memory: int
    start: int
    stop: int
    owner: str
    position: int | None

    def __str__(self) -> str:
        return self.owner if self.position is None else f"{self.owner}, position {self.position}"


OUTPUTS = "outputs"
Place = Callable[[Tensor], tuple[int, int]]


def by_address(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor with memory starts: all are in one."""
    return 0, tensor.data_ptr()


def by_storage(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor that has no address, such as one being traced, starts in its storage."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset() * tensor.itemsize


def spans(
    place: Place, targets: Sequence[Tensor], weights: Tensor, lists: Iterable[Sequence[Tensor]]
) -> list[Span]:
    """Everything that a call writes and reads."""
    named = [(OUTPUTS, targets), *((f"expert {i}", tensors) for i, tensors in enumerate(lists))]
    found = [_span(place, x, owner, t) for owner, tensors in named for t, x in enumerate(tensors)]
    return [*found, _span(place, weights, "weights", None)]


def _span(place: Place, tensor: Tensor, owner: str, position: int | None) -> Span:
    return Span(*extent(place, tensor), owner, position)


def extent(place: Place, tensor: Tensor) -> tuple[int, int, int]:
    """The memory of a tensor, its first byte there, and the one after its last."""
    memory, start = place(tensor)
    if tensor.numel() == 0:
        return memory, start, start
    reach = 1
    for n, step in zip(tensor.shape, tensor.stride(), strict=True):
        reach += (n - 1) * step
    return memory, start, start + reach * tensor.itemsize


def rows_overlap(place: Place, a: Tensor, b: Tensor) -> bool:
    """Whether a row of ``a`` and a row of ``b``, along the last dimension, share bytes."""
    if place(a)[0] != place(b)[0] or a.numel() == 0 or b.numel() == 0:
        return False
    (_, start, stop), (_, first, last) = extent(place, a), extent(place, b)
    if stop <= first or last <= start:
        return False
    return any(x < v and u < y for _, x, y in _rows(place, a) for _, u, v in _rows(place, b))


def _rows(place: Place, tensor: Tensor) -> list[tuple[int, int, int]]:
    """The extents of the rows along the last dimension."""
    if tensor.ndim <= 1:
        return [extent(place, tensor)]
    return [found for part in tensor.unbind(0) for found in _rows(place, part)]


def faults(found: Iterable[Span]) -> list[str]:
    """The pairs that overlap, of an output and anything else."""
    # In the order of their first bytes, an output overlaps what comes before it or after it.
    ordered = sorted(found, key=operator.itemgetter(0, 1, 2))
    reach: dict[bool, Span | None] = {True: None, False: None}  # the furthest output, and other
    pairs = []
    for span in ordered:
        if span.start == span.stop:
            continue
        is_output = span.owner == OUTPUTS
        for before in (reach[True], reach[False]) if is_output else (reach[True],):
            if before is not None and span.memory == before.memory and span.start < before.stop:
                pairs.append(f"{before} and {span} overlap in memory")
        furthest = reach[is_output]
        if furthest is None or (span.memory, span.stop) > (furthest.memory, furthest.stop):
            reach[is_output] = span
    return pairs


Extents = Sequence[tuple[int, int]]  # first bytes and those after the last, in order


def meets(extents: Extents, start: int, stop: int) -> bool:
    """Whether bytes ``start`` to ``stop`` are in one of ``extents``, none of which overlap."""
    before = bisect.bisect_left(extents, (stop,)) - 1  # the last that starts before their end
    return before >= 0 and extents[before][1] > start


def weights_meet(extents: Extents, weights: Tensor) -> bool:
    """The same of weights, which may be strided."""
    _, start, stop = extent(by_address, weights)
    return meets(extents, start, stop)


def apart(outputs: Extents, weights: Tensor, experts: Extents) -> bool:
    """Whether :func:`faults` has nothing to say of plain tensors, some ten times sooner."""
    if any(stop > start for (_, stop), (start, _) in itertools.pairwise(outputs)):
        return False
    if weights_meet(outputs, weights):
        return False
    return not any(meets(experts, *extent) for extent in outputs)

"""What loaders yield: every batch checked and taken apart, the first one before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from .._checks import shape


class Peeked:
    """A loader whose first batch has been looked at.

    The first pass goes on where the look ended, so that nothing is read twice, and loaders that
    count their passes or can be read only once do not notice. Only a loader with worker processes
    is started again: those of all the loaders that wait for their turn would fill the memory.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        # Not iter(loader): what rewinds on every iter() would start again in the middle.
        self._batches: Iterator[Any] | None = (batch for batch in loader)
        self._first = list(islice(self._batches, 1))
        if getattr(loader, "num_workers", 0) > 0:
            self._batches = None

    def fault(self, num_classes: int | None, name: str) -> str | None:
        """What is wrong with the first batch, or None; before the first pass.

        Args:
            num_classes: see :func:`unpack`.
            name: of the data set, for the message.
        """
        if not self._first:
            return f"{name}: the loader is empty"
        try:
            unpack(self._first[0], num_classes, f"{name}: batch 0")
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def peek(self) -> Any:
        """The first batch again; before the first pass, of a loader without a fault."""
        return self._first[0]

    def __iter__(self) -> Iterator[Any]:
        first, batches = self._first, self._batches
        self._first, self._batches = [], None  # not to keep the images
        return iter(self.loader) if batches is None else chain(first, batches)

    def __length_hint__(self) -> int:
        return length_hint(self.loader)


def unpack(batch: Any, num_classes: int | None, where: str) -> tuple[Tensor, Tensor | None]:
    """Images and int64 labels of a loader's batch, checked.

    Args:
        batch: (images, labels), or bare images when ``num_classes`` is None.
        num_classes: labels must lie in [0, num_classes). None: labels are not used, None comes
            back.
        where: starts every message.

    Raises:
        TypeError: not images and integer labels.
        ValueError: no images, another number of labels, labels out of range.
    """
    pair = isinstance(batch, tuple | list) and len(batch) == 2
    if num_classes is not None and not pair:
        raise TypeError(f"{where} must be (images, labels), got {_kind(batch)}")
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(images, Tensor):
        raise TypeError(f"{where}: images must be a tensor (B, ...), got {_kind(images)}")
    if images.ndim < 2 or not images.numel():
        raise ValueError(f"{where}: images must be a non-empty batch (B, ...), got {shape(images)}")
    if num_classes is None:
        return images, None
    return images, _labels(batch[1], len(images), num_classes, where)


def _labels(given: Any, count: int, num_classes: int, where: str) -> Tensor:
    labels = torch.as_tensor(given)
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise TypeError(
            f"{where}: labels must be (B,) integers, got {shape(labels)} {labels.dtype}"
        )
    if len(labels) != count:
        raise ValueError(f"{where} has {count} images but {len(labels)} labels")
    labels = labels.to("cpu", torch.int64)  # torch compares no unsigned ones but uint8
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise ValueError(
            f"{where}: labels must be in [0, {num_classes}), got {wrong.unique().tolist()[:8]}"
        )
    return labels


def _kind(value: Any) -> str:
    """``tuple of 3`` or ``dict of 2``: a batch that is none, in words."""
    return f"{type(value).__name__}{f' of {len(value)}' if hasattr(value, '__len__') else ''}"

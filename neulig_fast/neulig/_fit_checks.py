"""What a fit checks before any image is encoded; every function returns its faults."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .._checks import did_you_mean
from .batches import Peeked

if TYPE_CHECKING:
    from .engine import NeuLig

Loaders = Mapping[str, Iterable[Any]]


class FitOptions(NamedTuple):
    """The arguments of :meth:`NeuLig.fit`."""

    epochs: int
    lr: float
    batch_size: int
    validation: Loaders | float | None
    patience: int | None
    starts: int
    views: int
    checkpoint: str | Path | None
    checkpoint_every: int

    @property
    def fraction(self) -> float | None:
        """The share of the training images to validate on, where that is what was asked for."""
        return float(self.validation) if isinstance(self.validation, Real) else None


def setting_faults(engine: NeuLig, loaders: Any, options: FitOptions) -> Iterator[str]:
    """Arguments that do not fit, the tasks' names included."""
    yield from _task_faults("loaders", loaders, engine)
    for name in ("epochs", "batch_size", "starts", "views", "checkpoint_every", "patience"):
        value = getattr(options, name)
        if name == "patience" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{name} must be an int >= 1, got {value!r}"
    if not (isinstance(options.lr, Real) and 0 < options.lr < math.inf):
        yield f"lr must be positive and finite, got {options.lr!r}"
    if options.fraction is not None:
        if not 0 < options.fraction < 1:
            yield f"validation must be between 0 and 1 as a fraction, got {options.validation}"
        if options.views != 1:
            yield (
                "a validation fraction would put views of one image on both sides; "
                "pass validation loaders with views > 1"
            )
    elif options.validation is not None:
        yield from _task_faults("validation", options.validation, engine)
    elif options.patience is not None or options.starts != 1:
        yield "patience and starts > 1 choose by validation accuracy: pass validation="


def _task_faults(name: str, loaders: Any, engine: NeuLig) -> Iterator[str]:
    if not isinstance(loaders, Mapping):
        wanted = f"iterables of (images, labels), as in {{{next(iter(engine.heads))!r}: loader}}"
        yield f"{name} must map tasks to {wanted}, got {type(loaders).__name__}"
        return
    for task in loaders:
        if task not in engine.heads:
            yield f"{name}: no head for task {task!r}{did_you_mean(str(task), engine.heads)}"
    for task in engine.heads:
        if task not in loaders:
            yield f"{name}: no loader for task {task!r}"
        elif not isinstance(loaders[task], Iterable):
            got = type(loaders[task]).__name__
            yield f"{name}: the loader of task {task!r} must be iterable, got {got}"


class Source(NamedTuple):
    """One loader of a fit: ``name`` for messages; ``num_classes`` None where no label is used."""

    name: str
    loader: Peeked
    num_classes: int | None


def sources(
    engine: NeuLig, loaders: Loaders, labelled: bool, of: str, peeked: dict[int, Peeked]
) -> dict[str, Source]:
    """Task -> its loader, the first batch looked at, in the heads' order.

    ``peeked`` holds the looks so far by the loader's id: a loader that serves twice is looked at
    once, for a second ``iter`` may end the first one's reading.
    """
    found = {}
    for task, head in engine.heads.items():
        loader = loaders[task]
        if id(loader) not in peeked:
            peeked[id(loader)] = Peeked(loader)
        num_classes = head.num_classes if labelled else None
        found[task] = Source(f"{of} {task!r}", peeked[id(loader)], num_classes)
    return found


def zero_faults(features: Tensor, names: Iterable[str]) -> Iterator[str]:
    """Experts with features (B, N, D) that have no direction for a head to read."""
    zero = (features == 0).all(2).sum(0).tolist()
    for name, count in zip(names, zero, strict=True):
        if count:
            yield (
                f"expert {name!r} gives all-zero features for {count} of {len(features)} images, "
                "and the head normalises: make it Head(..., normalize=False)"
            )

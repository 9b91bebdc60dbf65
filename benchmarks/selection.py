"""Which cases are wanted: the whole grid, or what the command line asks for."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from . import machine
from .shapes import SHAPES

if TYPE_CHECKING:
    from .harness import Case


@dataclasses.dataclass(frozen=True)
class Selection:
    """What to measure. ``None`` means all; names are exact, providers parts of names.

    ``full``: every number of experts and outputs, weights per tensor, one thread; otherwise N = 5
    (and 2 for shapes that were asked for, since five large ones may not fit) and one output.
    """

    quick: bool = False
    full: bool = True
    shapes: frozenset[str] | None = None
    dtypes: frozenset[torch.dtype] | None = None
    providers: frozenset[str] | None = None

    def wants(self, shape: str, dtype: torch.dtype, threads: int, **numbers: int) -> bool:
        """Whether the case is measured. Toy runs measure all their shapes and numbers."""
        if self.dtypes is not None and dtype not in self.dtypes:
            return False
        if self.quick:
            return True
        if self.shapes is not None and shape not in self.shapes:
            return False
        if self.full:
            return True
        if self.shapes is None and shape in SHAPES and shape != "ViT-B-32":
            return False
        counts = (5,) if self.shapes is None else (2, 5)
        one = numbers.get("K", 1) == numbers.get("S", 1) == 1
        return numbers.get("N", 5) in counts and one and threads == machine.cores()

    def names_provider(self, name: str) -> bool:
        """Whether a provider of this name is measured."""
        return self.providers is None or any(p.lower() in name.lower() for p in self.providers)

    def narrowed(self, case: Case) -> Case | None:
        """The case with the wanted providers only; None when it is not wanted at all."""
        if not self.wants(case.shape, case.dtype, case.threads, **case.numbers):
            return None
        asked = [p for p in case.providers if p.side != "ceiling" and self.names_provider(p.name)]
        if not asked and any(p.side != "ceiling" for p in case.providers):
            return None
        chosen = [p for p in case.providers if p.side == "ceiling" or p in asked]
        return dataclasses.replace(case, providers=chosen)


_current = Selection()


@contextlib.contextmanager
def selecting(selection: Selection) -> Iterator[None]:
    """Cases that are made inside know what is wanted."""
    global _current
    before, _current = _current, selection
    try:
        yield
    finally:
        _current = before


def current() -> Selection:
    """The selection in force; the whole grid when nobody chose."""
    return _current


def wanted(shape: str, dtype: torch.dtype, threads: int | None = None, **numbers: int) -> bool:
    """Whether a case is worth making: asked before its tensors are, which takes seconds.

    The harness asks again for every case it gets, so that a benchmark whose tensors are small need
    not ask.
    """
    threads = machine.cores() if threads is None else threads
    return _current.wants(shape, dtype, threads, **numbers)

"""sd-mecha: TIES of three deltas."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import dropins
from . import Case

_TIES = "sd_mecha.extensions.builtin.merge_methods.ties"
_SIZES = {dropins.TOY: (16, 64), "matrix 1280 x 5120": (1280, 5120)}


def ties_sum(shape: tuple[int, int]) -> Callable[[], Tensor]:
    """A call of what the merge method wraps, looked up in each."""
    import sd_mecha

    g = torch.Generator().manual_seed(0)
    deltas = [torch.randn(shape, generator=g) for _ in range(3)]
    return lambda: sd_mecha.ties_sum.__wrapped__(*deltas, k=0.2)


def filter_top_k(shape: tuple[int, int]) -> Callable[[], Tensor]:
    """A call of the trimming of one delta."""
    import importlib

    ties = importlib.import_module(_TIES)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return lambda: ties.filter_top_k(delta, 0.2)


CASES = [
    Case(f"{_TIES}:{seam}", size, "sd_mecha", functools.partial(make, shape), terms=3)
    for size, shape in _SIZES.items()
    for seam, make in (("ties_sum.__wrapped__", ties_sum), ("filter_top_k", filter_top_k))
]

"""The calls of cross_moments that aot_triton.py compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from aot_sass import CompiledKernel

CALLED = ("cross_moments",)
# Rows, units of both: of transformers, main paths, and of a convolution, whose positions lie side
# by side; then sizes that divide nothing.
MAIN = [(8192, 768, 768), (8192, 3072, 3072)]
MAPS = (64, 49, 512)  # images, positions, channels
ODD = (3001, 77, 35)

Case = tuple[str, Any, Callable[[CompiledKernel], None]]


def cases(
    modules: Mapping[str, ModuleType], dtypes: Sequence[str], few: bool = False
) -> Iterator[Case]:
    """A name, a launch, and what is asked of its machine code."""
    for name in dtypes:
        dtype = getattr(torch, name)
        for shift in (True, False):
            for T, X, Y in MAIN[:1] if few else (*MAIN, ODD):
                x, y = (torch.empty(1, T, units, dtype=dtype) for units in (X, Y))
                title = f"{name} {T}x{X}x{Y}" + " shifted" * shift
                yield from _case(modules, title, x, y, shift, wide=(T, X, Y) in MAIN)
        if not few:
            B, T, C = MAPS
            maps = torch.empty(B, C, T, dtype=dtype).mT
            yield from _case(modules, f"{name} {B}x{T}x{C} maps", maps, maps, True, wide=False)


def _case(
    modules: Mapping[str, ModuleType],
    title: str,
    x: torch.Tensor,
    y: torch.Tensor,
    shift: bool,
    wide: bool,
) -> Iterator[Case]:
    acc = torch.promote_types(x.dtype, torch.float32)
    X, Y = x.shape[2], y.shape[2]
    shifts = [torch.empty(units, dtype=acc) if shift else None for units in (X, Y)]
    shapes = ((X, Y), (X,), (X,), (Y,), (Y,))
    results = tuple(torch.empty(shape, dtype=acc) for shape in shapes)
    for launch in modules["cross_moments"].launches(x, y, *shifts, results):
        tall = launch.options.get("HEIGHT") if x.dtype != torch.float64 else None
        yield title, launch, functools.partial(_check, wide=wide and tall is not None, tall=tall)


def _check(kernel: CompiledKernel, wide: bool, tall: int | None) -> None:
    """``tall``: rows of a tile that tensor cores multiply."""
    if wide:
        kernel.check_loads(2)  # a row of each factor
    if tall is not None:
        kernel.check_tensor_cores(tall)

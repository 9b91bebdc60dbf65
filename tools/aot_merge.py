"""The calls of merge_task_vectors that aot_triton.py compiles."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from aot_sass import CompiledKernel

CALLED = ("merge_task_vectors",)
P = 1 << 20
# rule, elect, zero_sign, divide, combine: task arithmetic, TIES, DARE with TIES, everything.
ARITHMETIC, TIES = (0, 0, 1, 0, 0), (1, 1, 1, 1, 0)
MODES = {"arithmetic": ARITHMETIC, "ties": TIES, "dare ties": (12, 2, -1, 2, 0)}
MODES["all"] = (15, 4, 0, 0, 1)
MODES["weighted count"] = (2, 3, 1, 1, 0)
FEW = (3,)
EXPERTS = (1, 2, *FEW, 5, 8, 11, 12, 64)

Case = tuple[str, Any, Callable[[CompiledKernel], None]]


def cases(
    modules: Mapping[str, ModuleType], dtypes: Sequence[str], few: bool = False
) -> Iterator[Case]:
    """A name, a launch, and what is asked of its machine code."""
    module = modules["merge_task_vectors"]
    for name in dtypes:
        for mode in ("arithmetic", "ties") if few else MODES:
            for n in FEW if few or mode == "weighted count" else EXPERTS:
                (launch,) = launches(module, getattr(torch, name), n, P, MODES[mode])
                yield (
                    f"{name} N{n} {mode}",
                    launch,
                    functools.partial(_check, n=n, divides=MODES[mode][3] > 0),
                )
        if not few:
            (launch,) = launches(module, getattr(torch, name), 3, P + 1, TIES)
            yield f"{name} N3 P+1 ties", launch, lambda kernel: None


def launches(
    module: ModuleType, dtype: torch.dtype, n: int, p: int, mode: tuple[int, ...]
) -> list[Any]:
    acc = torch.promote_types(dtype, torch.float32)
    numbers, places = torch.empty(5, n, dtype=acc), torch.empty(4, n, dtype=torch.int64)
    params, base, out = (torch.empty(*shape, dtype=dtype) for shape in ((n, p), (p,), (p,)))
    rule, *options = mode
    launch = module.config("merge_task_vectors", dtype, n, 1)
    tables = numbers, places if rule & 7 else None
    return module.launches(out, params, base, *tables, rule, 0, 0, *options, launch=launch)


def _check(kernel: CompiledKernel, n: int, divides: bool) -> None:
    if n <= 8:  # held as a whole
        kernel.check_loads(n + 1)
    if kernel.fused and not divides:  # a division has some of its own
        kernel.faults.append(f"{kernel.fused} fused multiply-adds")

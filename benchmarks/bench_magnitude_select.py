"""magnitude_select: the threshold of which a share of every task vector's elements is the largest.

Three experts and a base of 16 M parameters each, as a large layer has. Least traffic: all of them
once. The others make the magnitudes first, expert by expert, and find the smallest one that counts
by torch.topk; by torch.kthvalue, which selects too; by sorting; and by a full argsort, as mergekit
trims. They return thresholds: which of the ties counts follows from theirs in other ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neulig_fast.ops.magnitude_select import OP

from . import harness, machine, selection
from .ceilings import ceilings
from .harness import Case, Provider
from .layers import draw

EXPERTS = 3


@dataclasses.dataclass(frozen=True)
class Setting:
    """P parameters, of which this share is kept."""

    name: str
    P: int
    density: float

    @property
    def shape(self) -> str:
        return f"{self.name}, {self.density:.0%} kept"


def settings(quick: bool) -> Iterator[Setting]:
    for density in (0.5, 0.2):
        yield Setting("toy", 3001, density) if quick else Setting("16 M", 1 << 24, density)


def experts(P: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """(N, P) and the base they were fine-tuned from: differences of about 5 % of its size."""
    base = draw(P, seed=10, dtype=torch.float32, device=device)
    params = torch.empty(EXPERTS, P, dtype=dtype, device=device)
    for i, row in enumerate(params):
        row.copy_(base + 0.05 * draw(P, seed=11 + i, dtype=torch.float32, device=device))
    return params, base.to(dtype)


# -- other people's ways --------------------------------------------------------------------------


def topk(d: Tensor, count: int) -> Tensor:
    return torch.topk(d, count, sorted=False).values.min()


def kthvalue(d: Tensor, count: int) -> Tensor:
    return torch.kthvalue(d, d.numel() - count + 1).values


def sort(d: Tensor, count: int) -> Tensor:
    return torch.sort(d, descending=True).values[count - 1]


def argsort(d: Tensor, count: int) -> Tensor:
    return d[torch.argsort(d, descending=True)[:count][-1]]


def each(params: Tensor, base: Tensor, count: int, find: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The thresholds (N,) of all experts, one after the other."""
    return torch.stack([find((row.float() - base.float()).abs(), count) for row in params])


# -- the case -------------------------------------------------------------------------------------


def check(args: tuple[Tensor, Tensor, Tensor]) -> Callable[[Any], None]:
    """Everything is exact: thresholds, and cuts where there are any."""
    thresholds, cuts = OP.reference(*args)

    def compare(result: Any) -> None:
        found = result if isinstance(result, tuple) else (result,)
        for got, expected in zip(found, (thresholds, cuts), strict=False):
            if not torch.equal(got, expected):
                raise AssertionError(f"expected {expected.tolist()}, got {got.tolist()}")

    return compare


def make_case(setting: Setting, dtype: torch.dtype, device: str, threads: int) -> Case:
    params, base = experts(setting.P, dtype, device)
    count, row = round(setting.density * setting.P), 4 * setting.P
    args = params, torch.full((EXPERTS,), count, device=device), base

    def other(name: str, find: Callable[[Tensor, int], Tensor], rows: int) -> Provider:
        return Provider(name, lambda: each(params, base, count, find), needs=rows * row)

    return Case(
        op="magnitude_select",
        mode="fwd",
        shape=setting.shape,
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[
            *harness.ours(OP, device, lambda: OP(*args), args, 10 * row, needs=row),
            other("torch.topk", topk, 8),
            other("torch.kthvalue", kthvalue, 8),
            other("torch.sort", sort, 10),
            other("argsort, as mergekit", argsort, 10),
            *ceilings(params, threads, write=False),
        ],
        check=check(args),
        traffic=params.nbytes + base.nbytes,
        resident=params.nbytes + base.nbytes,
        numbers={"N": EXPERTS, "P": setting.P},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype in (torch.bfloat16, torch.float32):
        for threads in sorted({1, machine.cores()}) if device == "cpu" else (1,):
            for setting in settings(quick):
                if selection.wanted(setting.shape, dtype, threads, N=EXPERTS):
                    yield make_case(setting, dtype, device, threads)


if __name__ == "__main__":
    harness.main("magnitude_select", cases)

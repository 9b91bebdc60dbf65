"""gram: inner products of two models, and of three models' differences to a base.

Rows of 16 M parameters each. Least traffic: all of them once. The others multiply the flat rows by
their transpose, in the working precision and in fp32, and take dot products pair by pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from neulig_fast.ops.gram import OP

from . import harness, machine, selection
from .bench_magnitude_select import EXPERTS, experts
from .ceilings import ceilings
from .harness import Case, Provider

_BLOCK = 1 << 20  # columns of the oracle at a time


def differences(params: Tensor, base: Tensor | None) -> Tensor:
    wide = params.float()
    return wide if base is None else wide - base.float()


def matmul(params: Tensor, base: Tensor | None) -> Tensor:
    d = differences(params, base)
    return (d @ d.T)[None]


def pairs(params: Tensor, base: Tensor | None) -> Tensor:
    d = differences(params, base)
    products = [torch.dot(a, b) for a in d for b in d]
    return torch.stack(products).view(1, len(d), len(d))


def check(params: Tensor, base: Tensor | None) -> Callable[[Tensor], None]:
    expected = torch.zeros(len(params), len(params), dtype=torch.float64, device=params.device)
    for at in range(0, params.shape[1], _BLOCK):
        row = None if base is None else base[at : at + _BLOCK]
        d = differences(params[:, at : at + _BLOCK], row).double()
        expected += d @ d.T

    def compare(result: Tensor) -> None:
        error = float((result[0] - expected).abs().max() / expected.abs().max())
        if not error <= 1e-4:  # of a flat product in fp32
            raise AssertionError(f"relative error {error}")

    return compare


def make_case(P: int, based: bool, dtype: torch.dtype, device: str, threads: int) -> Case:
    rows, base = experts(P, dtype, device)
    params = rows if based else rows[:2]
    args = params, base if based else None, None
    traffic, needs = (len(params) + based) * P * dtype.itemsize, 4 * len(params) * P * 2
    return Case(
        op="gram",
        mode="differences" if based else "rows",
        shape="16 M" if P > 1 << 20 else "toy",
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[
            *harness.ours(OP, device, lambda: OP(*args), args, needs),
            Provider("matmul in fp32", lambda: matmul(*args[:2]), needs=needs),
            Provider("torch.dot, pair by pair", lambda: pairs(*args[:2]), needs=needs),
            *ceilings(params, threads, write=False),
        ],
        check=check(*args[:2]),
        traffic=traffic,
        resident=rows.nbytes + base.nbytes,
        numbers={"N": len(params), "P": P},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    P = 3001 if quick else 1 << 24
    for dtype in (torch.bfloat16, torch.float32):
        for threads in sorted({1, machine.cores()}) if device == "cpu" else (1,):
            for based in (False, True):
                shape, n = "toy" if quick else "16 M", EXPERTS if based else 2
                if selection.wanted(shape, dtype, threads, N=n):
                    yield make_case(P, based, dtype, device, threads)


if __name__ == "__main__":
    harness.main("gram", cases)

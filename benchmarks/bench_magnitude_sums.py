"""magnitude_sums: how much of three task vectors a draw leaves.

Three experts and a base of 16 M parameters each, half of which is kept. Least traffic: all of them
once. The others draw by torch's generator, in fp32 as mergekit does, eager and by torch.compile:
other elements, whose sums are nearly as large.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neulig_fast.ops.magnitude_sums import OP

from . import harness, machine, selection
from .bench_magnitude_select import EXPERTS, experts
from .ceilings import ceilings
from .harness import Case, Provider

_SHARE = 0.5


def drawn(params: Tensor, base: Tensor) -> Tensor:
    size = (params.float() - base.float()).abs()
    kept = size * (torch.rand_like(size) < _SHARE)
    return torch.stack((size.sum(1), kept.sum(1)))[None]


def check(args: tuple[Any, ...]) -> Callable[[Tensor], None]:
    expected = OP.reference(*args)

    def compare(result: Tensor) -> None:
        error = float((result / expected - 1).abs().max())
        if not error <= 20 / args[0].shape[1] ** 0.5:  # of a share that is drawn elsewhere
            raise AssertionError(f"relative error {error}")

    return compare


def make_case(P: int, dtype: torch.dtype, device: str, threads: int) -> Case:
    params, base = experts(P, dtype, device)
    share = torch.full((EXPERTS,), _SHARE, device=device)
    streams = torch.arange(EXPERTS, device=device)
    args = (params, base, None, None, None, None, None, share, 7, streams, 0)
    compiled, needs = torch.compile(drawn), 16 * EXPERTS * P
    return Case(
        op="magnitude_sums",
        mode="draws",
        shape="16 M" if P > 1 << 20 else "toy",
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[
            *harness.ours(OP, device, lambda: OP(*args), args, needs),
            Provider("eager", lambda: drawn(params, base), needs=needs),
            Provider("torch.compile", lambda: compiled(params, base), needs=needs),
            *ceilings(params, threads, write=False),
        ],
        check=check(args),
        traffic=params.nbytes + base.nbytes,
        resident=params.nbytes + base.nbytes,
        numbers={"N": EXPERTS, "P": P},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    P = 3001 if quick else 1 << 24
    for dtype in (torch.bfloat16, torch.float32):
        for threads in sorted({1, machine.cores()}) if device == "cpu" else (1,):
            if selection.wanted("toy" if quick else "16 M", dtype, threads, N=EXPERTS):
                yield make_case(P, dtype, device, threads)


if __name__ == "__main__":
    harness.main("magnitude_sums", cases)

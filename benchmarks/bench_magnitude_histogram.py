"""magnitude_histogram: counts of a digit of the magnitudes of task vectors.

Three experts and a base of 16 M parameters each. The first digit, of which all elements are
counted, and the second under the prefix of a middle magnitude, of which few are. Least traffic:
experts and base once. The others make the magnitudes, their bits and the digits, and count them by
torch.bincount or torch.histc.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from neulig_fast.ops import _magnitudes
from neulig_fast.ops._digits import BINS
from neulig_fast.ops.magnitude_histogram import OP

from . import harness, machine, selection
from .bench_magnitude_select import EXPERTS, experts
from .ceilings import ceilings
from .harness import Case, Provider

Counting = Callable[[Tensor], Tensor]


def bincount(digits: Tensor) -> Tensor:
    return torch.bincount(digits, minlength=BINS)


def histc(digits: Tensor) -> Tensor:
    return torch.histc(digits.float(), BINS, 0, BINS).long()


def each(params: Tensor, prefix: Tensor, digit: int, base: Tensor, count: Counting) -> Tensor:
    """Counts (N, 2048), expert by expert."""
    shift, width = _magnitudes.digits(params.dtype)[digit]
    found = []
    for row, above in zip(params, prefix, strict=True):
        bits = (row.float() - base.float()).abs().view(torch.int32)
        if digit > 0:
            bits = bits[bits >> (shift + width) == above]
        found.append(count(bits >> shift & (1 << width) - 1))
    return torch.stack(found)


def check(args: tuple[Tensor, Tensor, int, Tensor]) -> Callable[[Tensor], None]:
    expected = OP.reference(*args)

    def compare(result: Tensor) -> None:
        if not torch.equal(result, expected):
            raise AssertionError(f"{int((result != expected).sum())} counts differ")

    return compare


def make_case(P: int, digit: int, dtype: torch.dtype, device: str, threads: int) -> Case:
    params, base = experts(P, dtype, device)
    shift, width = _magnitudes.digits(dtype)[digit]
    middle = [_magnitudes.keys(row[:1001], base[:1001]).median() for row in params]
    args = params, torch.stack(middle) >> (shift + width), digit, base
    needs = 40 * P
    return Case(
        op="magnitude_histogram",
        mode="fwd",
        shape=f"{'16 M' if P > 1 << 20 else 'toy'}, digit {digit}",
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[
            *harness.ours(OP, device, lambda: OP(*args), args, needs),
            Provider("torch.bincount", lambda: each(*args, bincount), needs=needs),
            Provider("torch.histc", lambda: each(*args, histc), needs=needs),
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
            for digit in (0, 1):
                shape = f"{'toy' if quick else '16 M'}, digit {digit}"
                if selection.wanted(shape, dtype, threads, N=EXPERTS):
                    yield make_case(P, digit, dtype, device, threads)


if __name__ == "__main__":
    harness.main("magnitude_histogram", cases)

"""The machine's own limits: copying, a triad (two rows read, one written), a matrix product.

They are the roofs of a roofline plot. Every other benchmark measures the copy again in its own
rounds, since a shared machine changes its speed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from . import harness, machine
from .ceilings import ceilings
from .harness import Case, Provider


def _nothing_to_check(result: object) -> None:
    return None


def _case(device: str, dtype: torch.dtype, mode: str, shape: str, found: list[Provider]) -> Case:
    return Case("machine", mode, shape, dtype, device, machine.cores(), found, _nothing_to_check)


def memory_case(device: str, quick: bool) -> Case:
    """Rows far larger than the last-level cache."""
    size = (
        1 << 20
        if quick
        else max(2**30 if device == "cuda" else 2**28, 8 * machine.cache_bytes(device))
    )
    rows = torch.zeros(2, size // 4, device=device)
    out = torch.zeros_like(rows[0])

    def triad() -> torch.Tensor:
        return torch.add(rows[0], rows[1], alpha=3.0, out=out)

    found = [
        *ceilings(rows, machine.cores(), write=True),
        Provider("ceiling/triad torch", triad, "ceiling", traffic=3 * size),
    ]
    return _case(device, torch.float32, "memory", f"{size >> 20} MiB", found)


def product_case(device: str, dtype: torch.dtype, quick: bool) -> Case:
    """A square product. fp32 is fp32: without TF32, as torch does by default."""
    n = 64 if quick else _side(8192 if device == "cuda" else 2048, device, dtype)
    a = _square(n, device, dtype)
    product = Provider(
        "ceiling/matmul", lambda: a @ a, "ceiling", traffic=3 * a.nbytes, flops=2 * n**3
    )
    return _case(device, dtype, "matmul", f"{n} x {n}", [product])


def _square(n: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(n, n, generator=torch.Generator().manual_seed(3)).to(device, dtype)


def _side(most: int, device: str, dtype: torch.dtype) -> int:
    """How large a product to measure: one of a second at most, if it is not the smallest."""
    n = 256
    while n < most:
        a, begin = _square(n, device, dtype), time.perf_counter()
        (a @ a).sum().item()  # the host waits
        if 8 * (time.perf_counter() - begin) > 1:
            break
        n *= 2
    return n


def cases(device: str, quick: bool) -> Iterator[Case]:
    yield memory_case(device, quick)
    for dtype in (torch.float32, torch.bfloat16):
        yield product_case(device, dtype, quick)


if __name__ == "__main__":
    harness.main("machine", cases)

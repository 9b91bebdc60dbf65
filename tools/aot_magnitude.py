"""The calls of gram and the ops of magnitudes that aot_triton.py compiles."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch


def _arena(dtype: torch.dtype, n: int, p: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(n, p, dtype=dtype), torch.zeros(n, dtype=torch.int64)


def _base(dtype: torch.dtype, k: int, p: int) -> torch.Tensor | None:
    """None where a blend would have several outputs, so that both kinds are compiled."""
    return torch.empty(p, dtype=dtype) if k == 1 else None


def select_launches(module: ModuleType, dtype: torch.dtype, n: int, k: int, _s: int, p: int) -> Any:
    params, counts = _arena(dtype, n, p)
    thresholds = torch.empty(n, dtype=torch.promote_types(dtype, torch.float32))
    return module.launches(params, counts, _base(dtype, k, p), thresholds, counts.clone())


def histogram_launches(
    module: ModuleType, dtype: torch.dtype, n: int, k: int, _s: int, p: int
) -> Any:
    params, prefix = _arena(dtype, n, p)
    launch, counts = module.config("magnitude_histogram", dtype, n, 1), prefix.new_zeros(n, 2048)
    for digit in module.digits(dtype):
        yield from module.launches(params, prefix, digit, _base(dtype, k, p), counts, launch)


def _bounds(s: int) -> torch.Tensor | None:
    return torch.zeros(s + 1, dtype=torch.int64) if s > 1 else None


def sums_launches(module: ModuleType, dtype: torch.dtype, n: int, k: int, s: int, p: int) -> Any:
    launch, params = module.config("magnitude_sums", dtype, n, 1), _arena(dtype, n, p)[0]
    numbers = torch.empty(5, n, dtype=torch.promote_types(dtype, torch.float32))
    places, sums = torch.empty(4, n, dtype=torch.int64), torch.empty(s, 2, n, dtype=torch.float64)
    for rule in (4, 7):  # draws; all
        call = (params, _base(dtype, k, p), _bounds(s), numbers, places, rule, 0, 0)
        yield from module.launches(sums, *call, launch)


def gram_launches(module: ModuleType, dtype: torch.dtype, n: int, k: int, s: int, p: int) -> Any:
    launch, totals = (
        module.config("gram", dtype, n, 1),
        torch.empty(s, n * (n + 1) // 2, dtype=torch.float64),
    )
    call = _arena(dtype, n, p)[0], _base(dtype, k, p), _bounds(s)
    return module.launches(*call, totals, launch)


CALLS = {
    "gram": gram_launches,
    "magnitude_histogram": histogram_launches,
    "magnitude_select": select_launches,
    "magnitude_sums": sums_launches,
}

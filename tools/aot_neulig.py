"""The calls of the kernels of NeuLig's loss and training that aot_triton.py compiles."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def setting(n: int, k: int, p: int) -> tuple[int, int, int, bool]:
    """B, D, C of a training step of n experts, and whether its loss is the plain one: supervised,
    normalised and not centered. With more outputs it is none of these; other lengths are odd."""
    return 128, 512 + p % 2, 100 + p % 2, k == 1


def loss_launches(module: ModuleType, dtype: torch.dtype, n: int, k: int, _s: int, p: int) -> Any:
    B, D, C, plain = setting(n, k, p)
    acc = torch.promote_types(dtype, torch.float32)
    inputs = (
        empty(B, n, D, dtype=dtype),
        empty(n, n * D, dtype=acc),
        empty(n, dtype=acc),
        empty(C, D, dtype=dtype),
        empty(n, n, dtype=acc),
    )
    coopvec, results = empty(B, n, dtype=acc), [empty(dtype=acc)] * 3
    bias, targets = (None, empty(B, dtype=torch.int64)) if plain else (empty(C, dtype=acc), None)
    kept = module.scratch(coopvec, inputs[3], plain, plain)
    launch = module.config("neulig_loss", dtype, n, 1)
    return module.launches(inputs, bias, targets, coopvec, results, kept, 10.0, not plain, launch)


def loss_backward_launches(
    module: ModuleType, dtype: torch.dtype, n: int, k: int, _s: int, p: int
) -> Any:
    B, D, C, plain = setting(n, k, p)
    acc = torch.promote_types(dtype, torch.float32)
    scalar = empty(dtype=acc)
    grads = (scalar, None, None, None) if plain else (None, scalar, scalar, empty(B, n, dtype=acc))
    inputs = module.Inputs(
        grads,
        empty(B, n, dtype=acc),
        empty(B, n, D, dtype=dtype),
        empty(n, n * D, dtype=acc),
        empty(C, D, dtype=dtype),
        None if plain else empty(C, dtype=acc),
        empty(B, dtype=torch.int64) if plain else None,
        empty(n, n, dtype=acc),
    )
    launch = module.config("neulig_loss_backward", dtype, n, 1)
    return module.plan(inputs, 10.0, plain, not plain, [True] * 6, launch)[1]


def fit_launches(module: ModuleType, dtype: torch.dtype, n: int, k: int, _s: int, p: int) -> Any:
    B, D, C, plain = setting(n, k, p)
    acc = torch.promote_types(dtype, torch.float32)
    rows = empty(2 * B, dtype=torch.int64)
    lists = [
        [empty(B, n, D, dtype=dtype)],
        [empty(B, n, C, dtype=acc)],
        [empty(B, n, n, dtype=acc) if plain else empty(0, dtype=acc)],
        [empty(C, dtype=acc)],
        [empty(B, dtype=torch.int64)] if plain else [],
        [rows],
    ]
    state, terms = empty(3, n * n * D + n, dtype=acc), empty(2, 1, 2, dtype=acc)
    scratch = module.scratch(state, n, B, 0, 2, 1e-3)
    launch = module.config("neulig_fit", dtype, n, 1)
    settings = (B, 10.0, not plain, launch)
    return module.round_launches(state, lists, empty(n, n, dtype=acc), scratch, terms, *settings)


CALLS = {
    "neulig_fit": fit_launches,
    "neulig_loss": loss_launches,
    "neulig_loss_backward": loss_backward_launches,
}

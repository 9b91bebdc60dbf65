"""What the vision transformers of several libraries share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .rules import join
from .runs import Run
from .torch_layers import chain, norm_of_sum


def residual_branches(
    run: Run, module: Any, path: str, branches: Iterable[list[str]], x: Tensor
) -> Tensor:
    """x + f(norm(x)) for every branch [norm, *f] of submodules, one after the other.

    Each sum but the last is formed by the norm that follows it.
    """
    residual = None
    for norm, *names in branches:
        y, x = norm_of_sum(run, module.get_submodule(norm), join(path, norm), x, residual)
        residual = chain(run, module, path, names, y)
    return x if residual is None else x + residual


def with_tokens(x: Tensor, *tokens: Tensor) -> Tensor:
    """Tokens (R, k, D), in their order, before those of x (R, T, D)."""
    return torch.cat([*tokens, x], 1)


def as_tokens(x: Tensor) -> Tensor:
    """(R, D, H, W) -> (R, H * W, D)."""
    return x.flatten(2).transpose(1, 2)

"""DARE as mergekit means it: a task vector keeps the sum of its magnitudes.

    d_i = theta_i - theta_0, kept with the chance density_i, else 0
    s_i = sum |d_i| / sum |kept d_i|      1 where either is below 1e-7, or without ``rescale``
    theta = theta_0 + lambda sum_i w_i s_i (kept d_i), over those of the elected sign or all

Draws are those of :func:`neulig_fast.merge_task_vectors`, made once for the sums and again for the
merge: what is kept is never in memory. Their seed is drawn from torch, so that they follow
``torch.manual_seed``, and differ from call to call, as mergekit's do.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...methods._kept import restoring
from ...ops import magnitude_sums, merge_task_vectors
from ._rows import tiles


def dare(settings: Mapping[str, Any], tensors: Sequence[Tensor], elected: bool) -> Tensor:
    """The merge of N experts and their base, the last of the tensors."""
    flat = [tensor.reshape(-1) for tensor in tensors]
    out = flat[-1].new_empty(tensors[0].shape)
    numbers = functools.partial(torch.tensor, dtype=torch.float64, device=out.device)
    draws: dict[str, Any] = {
        "density": numbers(settings["density"]),
        "streams": torch.arange(len(flat) - 1, device=out.device),
    }
    seed, weights = int(torch.randint(2**63 - 1, ())), numbers(settings["weight"])
    how: dict[str, Any] = {"seed": seed, "lam": settings["lambda"], **draws}
    how["elect"] = "weighted_sum" if elected else "none"
    how["divide"] = "weights" if settings["normalize"] else "none"
    if settings["rescale"]:
        how["scales"] = _scales(flat, seed, draws)
    for tile in tiles(flat):
        part = out.view(-1)[tile.start : tile.start + tile.rows.shape[1]]
        merge_task_vectors(
            tile.rows[:-1], weights, tile.rows[-1], start=tile.start, out=part, **how
        )
    return out


def _scales(flat: Sequence[Tensor], seed: int, draws: Mapping[str, Tensor]) -> Tensor:
    """(N,): what makes up for the magnitudes that were dropped. Experts one by one: as rows of
    one tensor they would have to be copied."""
    *experts, base = flat
    each = [{name: part[i : i + 1] for name, part in draws.items()} for i in range(len(experts))]
    sums = [
        magnitude_sums(x[None], base, seed=seed, **own)
        for x, own in zip(experts, each, strict=True)
    ]
    before, after = torch.cat(sums, -1)[0]
    return restoring(before, after)

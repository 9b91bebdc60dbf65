"""DARE as mergekit means it: a task vector keeps the sum of its magnitudes.

    d_i = theta_i - theta_0, kept with the chance density_i, else 0
    s_i = sum |d_i| / sum |kept d_i|      1 where either is below 1e-7, or without ``rescale``
    theta = theta_0 + lambda sum_i w_i s_i (kept d_i), over those of the elected sign or all

Draws are those of :func:`neulig_fast.merge_task_vectors`. Their seed is drawn from torch, so that
they follow ``torch.manual_seed``, and differ from call to call, as mergekit's do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._checks import accumulation_dtype
from ...ops import merge_task_vectors
from ._rows import steps

_LEAST = 1e-7  # sums of magnitudes below it are not made up for


def dare(settings: Mapping[str, Any], tensors: Sequence[Tensor], elected: bool) -> Tensor:
    """The merge of N experts and their base, the last of the tensors."""
    *experts, base = (tensor.reshape(-1) for tensor in tensors)
    kept, scales = _kept(settings, experts, base)
    out, weights = base.new_empty(tensors[0].shape), kept.new_tensor(settings["weight"])
    how: dict[str, Any] = {"lam": settings["lambda"], "scales": scales}
    how["elect"] = "weighted_sum" if elected else "none"
    how["divide"] = "weights" if settings["normalize"] else "none"
    for block in steps(len(base)):
        change = merge_task_vectors(kept[:, block], weights, **how)
        out.view(-1)[block] = base[block].to(kept.dtype) + change
    return out


def _kept(
    settings: Mapping[str, Any], experts: Sequence[Tensor], base: Tensor
) -> tuple[Tensor, Tensor]:
    """(N, P) in the type of sums: what is left of task vectors, and what makes up for the rest."""
    seed = int(torch.randint(2**63 - 1, ()))
    kept = base.new_empty((len(experts), len(base)), dtype=accumulation_dtype(base.dtype))
    density, one = kept.new_tensor(settings["density"]), kept.new_ones(1)
    streams = torch.arange(len(experts), device=base.device)
    sums = torch.zeros(2, len(experts), dtype=torch.float64, device=base.device)
    for block in steps(len(base)):
        origin = base[block].to(kept.dtype)
        for i, expert in enumerate(experts):
            d, rest, only = expert[block].to(kept.dtype) - origin, kept[i, block], slice(i, i + 1)
            draws = {"density": density[only], "seed": seed, "streams": streams[only]}
            merge_task_vectors(d[None], one, start=block.start, out=rest, **draws)
            if settings["rescale"]:
                sums[0, i] += d.abs_().sum()
                sums[1, i] += rest.abs().sum()
    before, after = sums
    scales = torch.where((before < _LEAST) | (after < _LEAST), 1.0, before / after)
    return kept, scales.to(kept.dtype)

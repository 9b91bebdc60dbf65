"""Arcee Fusion as mergekit has it: an expert's elements that matter most replace the base's.

    importance = |theta_1 - theta_0| sum_row p log(p / q)     p, q: softmax of a row, plus 1e-8
    theta = theta_1 where importance >= median + 1.5 (Q3 - Q1), else theta_0

mergekit's own arithmetic, but for whole rows that the caches hold in place of whole tensors. The
quartiles are mergekit's, with its draws: of a million elements, if there are more.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..._checks import accumulation_dtype
from ...methods import BLOCK
from .._seam import Unsupported
from .._tensors import check_alike
from ._rows import blocks


def fusion(module: ModuleType, wide: bool) -> Callable[..., Tensor]:
    """``arcee_fusion`` by the functions of its module. ``wide``: in the type of sums."""

    def arcee_fusion(group: Any) -> Tensor:
        check_alike(group.tensors)
        base, expert = group.base.tensor, group.non_base[0].tensor
        if not base.ndim:
            raise Unsupported("scalars")
        kind = accumulation_dtype(base.dtype) if wide else base.dtype
        base, expert = (x.view(-1, x.shape[-1]) for x in (base, expert))
        importance = torch.empty_like(base, dtype=kind)
        size = max(2, BLOCK // base.shape[1])  # one sum alone is split among the threads
        for rows in blocks(len(base), size):
            before, after = base[rows].to(kind), expert[rows].to(kind)
            importance[rows] = module._compute_importance(after, before)
        threshold = module.DynamicThresholdFusion().calculate_dynamic_threshold(importance)
        # The type that mergekit's mask of fp32 makes of a 16-bit result.
        out = torch.empty_like(base, dtype=torch.promote_types(kind, torch.float32))
        for rows in blocks(len(base), size):
            origin = base[rows].to(kind)
            change = (expert[rows].to(kind) - origin) * (importance[rows] >= threshold).float()
            torch.add(origin, change, out=out[rows])
        return out.view(group.base.tensor.shape)

    return arcee_fusion

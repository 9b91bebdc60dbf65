"""WUDI-Merging (arXiv 2503.08099): its gradient in closed form.

    loss(m) = sum_i |(m - t_i) t_i^T|^2 / |t_i|^2
    gradient = 2 (m G - T),   G = sum_i t_i^T t_i / |t_i|^2,   T = sum_i t_i t_i^T t_i / |t_i|^2

G and T do not change while Adam works on m, so that a step is one matrix product; the original
makes N of them there and N back.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._seam import Seam, Unsupported
from ._tensors import as_lists, same_names

_RATE = 1e-5


def seams() -> list[Seam]:
    """Of the function for a list of task vectors."""
    return [Seam("fusion_bench.method.wudi.wudi:wudi_merging", None, wudi_merging)]


def wudi_merging(
    task_vectors: Sequence[Mapping[str, Tensor]],
    accelerator: Any = "cuda",
    iter_num: int = 300,
    exclude_keys: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The merged task vector: matrices by ``iter_num`` steps of Adam from the sum, the mean of
    others."""
    names = same_names(task_vectors)
    lists = as_lists([[vector[name] for name in names] for vector in task_vectors])
    if any(dtype.itemsize < 4 for dtype in lists.dtypes):
        raise Unsupported("16-bit tensors, whose steps are lost")
    merged = {}
    for name, *tensors in zip(names, *lists.lists, strict=True):
        stack = torch.stack([tensor.detach().to(accelerator) for tensor in tensors])
        if stack.ndim == 3 and name not in (exclude_keys or ()):
            found: Tensor = _descended(stack, iter_num)
        else:
            found = stack.sum(0) / len(stack)
        merged[name] = found.to(lists.device)
    return merged


def _descended(stack: Tensor, steps: int) -> nn.Parameter:
    """(O, I) of N task vectors (N, O, I)."""
    gram, target = 0, 0
    for t in stack:
        own = t.T @ (t / t.norm().square())
        gram, target = gram + own, target + t @ own
    merged = nn.Parameter(stack.sum(0))
    adam = torch.optim.Adam([merged], lr=_RATE)
    for _ in range(steps):
        merged.grad = 2 * (merged.detach() @ gram - target)
        adam.step()
    merged.grad = None
    return merged

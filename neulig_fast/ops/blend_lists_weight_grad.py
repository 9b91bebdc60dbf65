"""blend_lists_weight_grad: the gradient of a list blend with respect to its weights.

    g[t, i] = <grad_t, x[i, t]>        and, for weights (N,), their sum over t

All N * T dot products in one read of the experts and of the incoming gradients.

Numerics: products and sums over part of a chunk of a tensor in fp32 (fp64 for fp64 experts), the
rest in fp64 and in a fixed order, so that a backend gives the same bits on every run (the reference
sums as PyTorch does). Across backends results agree within the tolerance rule.

Traffic: (N + 1) * P values read once, P the number of elements of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._list_checks import not_dense
from .._registry import Op
from ..tensor_lists import TensorLists
from . import _arena, _lists


def _faults(weights: Tensor, grads: list[Tensor | None], experts: list[Tensor]) -> list[str]:
    found = _lists.faults(weights, experts)
    if found:
        return found
    first = experts[: len(experts) // weights.shape[-1]]
    if len(grads) != len(first):
        return [f"grads must be T = {len(first)} tensors like each expert's, got {len(grads)}"]
    for t, (grad, x) in enumerate(zip(grads, first, strict=True)):
        if grad is None:
            continue
        if grad.shape != x.shape or grad.device != x.device:
            found.append(
                f"grads, position {t}: must be {_checks.shape(x)} on {x.device} like the experts, "
                f"got {_checks.shape(grad)} on {grad.device}"
            )
        if grad.dtype not in _checks.FLOAT_DTYPES:
            found.append(f"grads, position {t}: must be fp32, bf16, fp16 or fp64, got {grad.dtype}")
        if (reason := not_dense(grad)) is not None:
            found.append(f"grads, position {t}: {reason}")
    return found


def blend_lists_weight_grad_reference(
    weights: Tensor, grads: list[Tensor | None], experts: list[Tensor]
) -> Tensor:
    """The formula in plain PyTorch. ``weights`` say the shape of the result, no more; a gradient
    that is None is zero."""
    lists = _lists.rows(experts, weights.shape[-1])
    dtype = _lists.result_dtype(x.dtype for x in experts)
    result = weights.new_zeros((len(grads), len(lists)), dtype=dtype)
    for t, grad in enumerate(grads):
        if grad is not None:
            acc = _checks.accumulation_dtype(lists[0][t].dtype)
            dots = [(grad.to(acc) * tensors[t].to(acc)).sum() for tensors in lists]
            result[t] = torch.stack(dots)
    return result if weights.ndim == 2 else result.sum(0)


def blend_lists_weight_grad_fake(
    weights: Tensor, grads: list[Tensor | None], experts: list[Tensor]
) -> Tensor:
    dtype = _lists.result_dtype(x.dtype for x in experts)
    return weights.new_empty(weights.shape, dtype=dtype)


def _run(backend: str) -> Any:
    def run(weights: Tensor, grads: list[Tensor | None], experts: list[Tensor]) -> Tensor:
        if not experts:
            return weights.new_zeros(weights.shape, dtype=torch.float32)
        lists = TensorLists.of(_lists.rows(experts, weights.shape[-1]))
        return _lists.weight_grad(backend, weights.ndim == 2, grads, lists)

    return run


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=25)
    other = _arena.Draw(device, torch.float32, seed=26)
    shapes: tuple[tuple[int, ...], ...] = ((), (5, 3), (0, 4), (17,), (1, 129))
    experts = [draw.normal(*shape) for _ in range(3) for shape in shapes]
    yield draw.normal(3), [draw.normal(*shape) for shape in shapes], experts
    experts = [x for _ in range(4) for x in (draw.normal(300)[7:136], other.normal(2, 33))]
    yield draw.normal(2, 4), [other.normal(129), draw.normal(2, 33)], experts
    yield draw.normal(3, 2), [draw.normal(9), None, draw.normal(9)], [draw.normal(9)] * 6
    yield draw.normal(11), [draw.normal(5000)], [draw.normal(5000) for _ in range(11)]


OP = Op(
    "blend_lists_weight_grad",
    "(Tensor weights, Tensor?[] grads, Tensor[] experts) -> Tensor",
    native="(Tensor table, Tensor grads, int experts, int chunk, int chunks, "
    "bool per_tensor, ScalarType dtype, ScalarType grad_dtype) -> Tensor",
    reference=blend_lists_weight_grad_reference,
    fake=blend_lists_weight_grad_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    samples=_samples,
    terms=lambda weights, grads, experts: max(1, sum(x.numel() for x in experts)),
)
OP.add_native("cpu", run=_run("cpu"))
OP.add_native("cuda", run=_run("cuda"), why_not=_lists.why_not_gpu)
OP.add_triton(run=_run("triton"))

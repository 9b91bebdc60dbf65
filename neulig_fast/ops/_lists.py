"""What the ops over lists of tensors share: their arguments, and how a backend is run on tables.

The dispatcher sees N lists of T tensors as one list, expert after expert. The fast rooms never see
tensors at all: they are given :class:`neulig_fast.TensorLists`' tables of addresses, and all have
one signature, that of the native twins::

    blend_lists(weights, table, outputs, base, chunk, chunks, dtype, out_dtype)
    blend_lists_weight_grad(table, grads, experts, chunk, chunks, per_tensor, dtype, grad_dtype)

``outputs`` and ``grads`` are T addresses (int64, on the device), outputs from ``base`` on.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._list_checks import are_lists, kind, list_faults
from .._memory import large_pages
from .._registry import Op, log
from ..tensor_lists import Group, Target, TensorLists, held, host, on_device
from ._arena import MAX_GPU_EXPERTS
from ._sharded import is_dtensor

# Elements of a chunk. On the CPU it is what a thread takes at a time. On CUDA it is a block's work:
# 16 KiB of each tensor to blend, and more columns for a sum, whose reduction they pay for.
CPU_CHUNK = 16384
CUDA_BYTES = {"blend_lists": 16384, "blend_lists_weight_grad": 65536}


def rows(experts: Sequence[Tensor], count: int) -> tuple[tuple[Tensor, ...], ...]:
    """One list of N * T tensors as N lists of T."""
    each = len(experts) // count
    return tuple(tuple(experts[i * each : (i + 1) * each]) for i in range(count))


def result_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The accumulation dtype of sums over tensors of several dtypes."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def faults(weights: Tensor, experts: Sequence[Tensor]) -> list[str]:
    """What is wrong with weights and N * T expert tensors."""
    count = weights.shape[-1] if weights.ndim in (1, 2) else 0
    if count >= 1 and len(experts) % count == 0:
        lists = rows(experts, count)
        return weight_faults(weights, lists) + list_faults(lists)
    sizes = f"{_checks.shape(weights)} and {len(experts)} tensors"
    return [
        f"weights must be (N,) or (T, N) with N >= 1 and experts N * T tensors, got {sizes}",
        *_dtype_faults(weights),
    ]


def weight_faults(weights: Any, lists: Sequence[Any]) -> list[str]:
    """What is wrong with the weights of N lists of T tensors."""
    if not isinstance(weights, Tensor):
        return [f"weights must be a tensor, got {kind(weights)}"]
    found = _dtype_faults(weights)
    if not are_lists(lists):
        return found  # said of the experts
    n, t = len(lists), len(lists[0])
    if tuple(weights.shape) not in ((n,), (t, n)):
        sizes = f"here N = {n}, T = {t}"
        found.append(f"weights must be (N,) or (T, N), {sizes}; got {_checks.shape(weights)}")
    if t and isinstance(lists[0][0], Tensor) and weights.device != lists[0][0].device:
        device = lists[0][0].device
        found.append(f"weights must be on {device} like the experts, got {weights.device}")
    if is_dtensor(weights) and not any(map(is_dtensor, lists[0])):
        found.append("weights are a DTensor, the experts plain tensors; pass weights.to_local()")
    return found


def _dtype_faults(weights: Tensor) -> list[str]:
    if weights.is_floating_point():
        return []
    return [f"weights must be floating point, got {weights.dtype}"]


def why_not_gpu(weights: Tensor, *_args: Any) -> str | None:
    """What the GPU kernels ask of a call."""
    if weights.shape[-1] > MAX_GPU_EXPERTS:
        return f"{weights.shape[-1]} experts, more than {MAX_GPU_EXPERTS}"
    return None


def choose(op: Op, device: torch.device, args: Sequence[Any]) -> str:
    """The backend of a call that does not go through the dispatcher, logged as if it did."""
    backend = op.choose(device.type, args)
    log.debug("%s: %s on %s", op.name, backend, device.type)
    return backend


def room(op: str, backend: str, group: Group) -> tuple[Callable[..., Any], int]:
    """A backend's function over tables, and how many elements its chunks have."""
    if backend == "triton":
        module = importlib.import_module(f"neulig_fast.kernels.{op}")
        return getattr(module, op), module.chunk(group.dtype, group.addresses.shape[1])
    native = getattr(torch.ops.neulig_fast_C, op).default
    return native, CPU_CHUNK if backend == "cpu" else CUDA_BYTES[op] // group.dtype.itemsize


# -- blend ----------------------------------------------------------------------------------------


def _launch(
    backend: str, group: Group, weights: Tensor, starts: Tensor, base: int, dtype: torch.dtype
) -> None:
    run, chunk = room("blend_lists", backend, group)
    table, chunks = group.table(chunk)
    if chunks:
        w = weights.to(_checks.accumulation_dtype(group.dtype)).contiguous().resolve_neg()
        run(w, held(table), held(starts), base, chunk, chunks, group.dtype, dtype)


def targets(lists: TensorLists, outputs: Sequence[Tensor]) -> list[Target]:
    """How ``outputs``, T contiguous tensors, are written: one target per pair of dtypes."""
    made = []
    for whole in lists.groups:
        mine = [outputs[position] for position in whole.positions]
        for group, some in whole.split([output.dtype for output in mine]):
            addresses = host([mine[i].data_ptr() for i in some])
            made.append(Target(group, on_device(addresses, whole.device), mine[some[0]].dtype))
    return made


def write(backend: str, weights: Tensor, into: Iterable[Target]) -> None:
    """Blend into outputs, one launch per target."""
    for target in into:
        _launch(backend, target.group, weights, target.addresses, 0, target.dtype)


def blended(
    backend: str,
    weights: Tensor,
    lists: TensorLists,
    out_dtype: torch.dtype | None,
    view: Callable[[Tensor, torch.Size], Tensor] = Tensor.view,
) -> list[Tensor]:
    """The blended tensors, in one new buffer per dtype, made into tensors after the launches.

    ``view`` gives a run of elements its shape.
    """
    launched = []
    for group in lists.groups:
        dtype = out_dtype or group.dtype
        layout = group.layout(dtype.itemsize)
        buffer = large_pages(torch.empty(layout.width, dtype=dtype, device=group.device))
        _launch(backend, group, weights, layout.starts, buffer.data_ptr(), dtype)
        launched.append((group, layout, buffer))
    results: list[Any] = [None] * lists.num_tensors
    for group, layout, buffer in launched:
        # "Unsafe": to autograd these are tensors of their own, which nothing ties to each other.
        pieces = torch.unsafe_split_with_sizes(buffer, layout.pieces)
        for position, kept in zip(group.positions, layout.kept, strict=True):
            results[position] = view(pieces[kept], lists.shapes[position])
    return results


# -- gradient -------------------------------------------------------------------------------------


def dense(grad: Tensor | None) -> Tensor | None:
    """An incoming gradient as kernels read it: no expanded scalar, sparse rows or negated view."""
    if grad is None:
        return None
    grad = grad if grad.layout is torch.strided else grad.to_dense()
    return grad.contiguous().resolve_neg()


def weight_grad(
    backend: str, per_tensor: bool, grads: Sequence[Tensor | None], lists: TensorLists
) -> Tensor:
    """(N,), or (T, N): the dot products of T dense gradients (None: zeros) with N * T tensors."""
    shape = (lists.num_tensors, lists.num_experts) if per_tensor else (lists.num_experts,)
    total = torch.zeros(shape, dtype=torch.float64, device=lists.device)
    for whole in lists.groups:
        mine = [grads[position] for position in whole.positions]
        for group, some in whole.split([whole.dtype if g is None else g.dtype for g in mine]):
            part = _dots(backend, per_tensor, group, [mine[i] for i in some])
            if not per_tensor:
                total += part[0]
            elif len(group.positions) == lists.num_tensors:
                total = part
            else:
                total[held(group.rows)] = part
    return total.to(result_dtype(lists.dtypes))


def _dots(backend: str, per_tensor: bool, group: Group, grads: Sequence[Tensor | None]) -> Tensor:
    """(T, N), or (1, N), in fp64."""
    run, chunk = room("blend_lists_weight_grad", backend, group)
    table, chunks = group.table(chunk)
    dtype = next((grad.dtype for grad in grads if grad is not None), group.dtype)
    addresses = host([0 if g is None else g.data_ptr() for g in grads])
    experts = group.addresses.shape[1]
    if not chunks:
        shape = (len(grads) if per_tensor else 1, experts)
        return torch.zeros(shape, dtype=torch.float64, device=group.device)
    there = on_device(addresses, group.device)
    return run(held(table), held(there), experts, chunk, chunks, per_tensor, group.dtype, dtype)

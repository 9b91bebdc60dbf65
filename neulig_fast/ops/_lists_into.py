"""blend_lists_: blend_lists into tensors that are there already."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._list_checks import (
    address_faults,
    are_lists,
    as_list,
    as_lists,
    has_memory,
    kind,
    list_faults,
    not_dense,
)
from ..tensor_lists import Target, TensorLists, extents_of
from . import _lists, _overlap, _sharded_lists
from ._sharded import is_dtensor
from .blend_lists import OP, Experts, by_table, prepare, refuse_transforms

Outputs = Sequence[Tensor] | TensorLists


def blend_lists_(outputs: Outputs, weights: Tensor, experts: Experts) -> Outputs:
    """Blend N lists of T tensors into T given tensors; see :func:`neulig_fast.blend_lists`.

    Args:
        outputs: T contiguous tensors with the shapes of the positions, any of the four dtypes (each
            rounded to once), at any address; or :class:`neulig_fast.TensorLists` of one such list,
            which spares later calls with the same prepared ``experts`` the checks. They overlap
            neither each other nor an expert: a merge never destroys what it reads.
        weights: (N,) or (T, N).
        experts: N lists of T tensors, or :class:`neulig_fast.TensorLists` of them.

    Returns:
        ``outputs``. No gradient is recorded.

    Raises:
        ValueError: whatever does not fit, all of it listed; nothing has been written then.
    """
    prepared = experts if isinstance(experts, TensorLists) else None
    lists = prepared.lists if prepared else as_lists(experts)
    into = outputs if isinstance(outputs, TensorLists) else None
    targets: Any = into.lists[0] if into else as_list(outputs)
    known = _known(into, prepared)
    found = [] if prepared else list_faults(lists)
    found += _lists.weight_faults(weights, lists) + _grad_faults(targets, weights)
    if known is None:
        found += _output_faults(outputs, targets, lists)
    _checks.raise_all("blend_lists_", found)
    refuse_transforms("blend_lists_", weights, [targets, *lists])
    if _sharded_lists.any_dtensor(() if prepared else lists):
        weights, mine, theirs = _sharded_lists.shards("blend_lists_", weights, targets, lists)
        blend_lists_(mine, weights, theirs)
        _count_writes(targets)
    elif by_table(weights, experts, lists) and (known is not None or has_memory(targets)):
        blended = prepared or prepare("blend_lists_", lists)
        if known is None or into is None or _overlap.weights_meet(into.extents, weights):
            _check_memory(targets, weights, blended)
        known = known or _lists.targets(blended, targets)
        if prepared and into:
            prepared.targets[into] = known
        _write(targets, weights.detach(), blended, known)
    else:
        flat = [x.detach() for xs in lists for x in xs]
        torch.ops.neulig_fast.blend_lists_.default(list(targets), weights.detach(), flat)
    return outputs


def _known(into: TensorLists | None, prepared: TensorLists | None) -> list[Target] | None:
    """How these outputs are written, where they were before; looked up in eager mode only."""
    if into is None or prepared is None or torch.compiler.is_compiling():
        return None
    return prepared.targets.get(into)


def _check_memory(targets: Sequence[Tensor], weights: Tensor, lists: TensorLists) -> None:
    found = address_faults([targets], "outputs")
    if not _overlap.apart(extents_of(targets), weights, lists.extents):
        found += _overlap.faults(_overlap.spans(_overlap.by_address, targets, weights, lists.lists))
    _checks.raise_all("blend_lists_", found)


def _write(
    targets: Sequence[Tensor], weights: Tensor, lists: TensorLists, into: list[Target]
) -> None:
    args = (weights, lists.flat, None)
    backend = _lists.choose(OP, weights.device, args)
    if backend == "torch":
        _write_reference(targets, weights, lists.flat)
    else:
        _lists.write(backend, weights, into)
    _count_writes(targets)


def _write_reference(targets: Sequence[Tensor], weights: Tensor, experts: Sequence[Tensor]) -> None:
    for dtype in {x.dtype for x in targets}:  # each position is rounded once, to its own dtype
        for target, result in zip(targets, OP.reference(weights, experts, dtype), strict=True):
            if target.dtype == dtype:
                target.copy_(result)


def _count_writes(targets: Sequence[Tensor]) -> None:
    """Tell autograd, which sees neither kernels nor what happens to a DTensor's shard."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([x for x in targets if not x.is_inference()])


# -- what torch.compile and tensors without memory see ---------------------------------------------


@torch.library.custom_op(
    "neulig_fast::blend_lists_",
    mutates_args=("outputs",),
    schema="(Tensor(a!)[] outputs, Tensor weights, Tensor[] experts) -> ()",
)
def _node(outputs: list[Tensor], weights: Tensor, experts: list[Tensor]) -> None:
    """One node of a graph, which runs as eager mode does."""
    lists = _opened(outputs, weights, experts)
    if has_memory([weights, *outputs, *experts]):
        blended = prepare("blend_lists_", lists)
        _check_memory(outputs, weights, blended)
        _write(outputs, weights, blended, _lists.targets(blended, outputs))
    else:
        _write_reference(outputs, weights, experts)


@_node.register_fake
def _(outputs: list[Tensor], weights: Tensor, experts: list[Tensor]) -> None:
    # When a graph runs, its outputs may be copies that are written back: only here, where storages
    # are shared as they are outside, is an overlap always seen.
    lists = _opened(outputs, weights, experts)
    found = _overlap.faults(_overlap.spans(_overlap.by_storage, outputs, weights, lists))
    _checks.raise_all("blend_lists_", found)


def _opened(
    outputs: list[Tensor], weights: Tensor, experts: list[Tensor]
) -> tuple[tuple[Tensor, ...], ...]:
    """N lists of T of the experts' tensors; ValueError if the arguments do not fit."""
    _checks.raise_all("blend_lists_", _lists.faults(weights, experts))
    lists = _lists.rows(experts, weights.shape[-1])
    _checks.raise_all("blend_lists_", _output_faults(outputs, outputs, lists))
    return lists


# -- what is wrong with the arguments --------------------------------------------------------------


def _grad_faults(targets: Any, weights: Any) -> list[str]:
    if not torch.is_grad_enabled():
        return []
    found = [
        f"outputs, position {t}: requires grad and would be overwritten; use torch.no_grad()"
        for t, x in enumerate(targets if isinstance(targets, tuple) else ())
        if isinstance(x, Tensor) and x.requires_grad
    ]
    if isinstance(weights, Tensor) and weights.requires_grad:
        found.append("weights require grad, which blend_lists_ would not record; detach them")
    return found


def _output_faults(
    outputs: Outputs, targets: Sequence[Tensor], lists: Sequence[Sequence[Tensor]]
) -> list[str]:
    if isinstance(outputs, TensorLists) and outputs.num_experts != 1:
        return [f"outputs must be one list, got {outputs.num_experts}"]
    if not isinstance(targets, Sequence):
        return [f"outputs must be a list of tensors, got {kind(targets)}"]
    if not are_lists(lists):
        return []  # said of the experts
    found, first = [], lists[0]
    if len(targets) != len(first):
        found.append(f"outputs must be T = {len(first)} tensors, got {len(targets)}")
    for t, (x, expert) in enumerate(zip(targets, first, strict=False)):
        if not isinstance(x, Tensor):
            found.append(f"outputs, position {t}: a tensor is needed, got {kind(x)}")
        elif isinstance(expert, Tensor):  # else it is said of the experts
            found += [f"outputs, position {t}: {fault}" for fault in _output_fault(x, expert)]
    return found


def _output_fault(x: Tensor, expert: Tensor) -> Iterator[str]:
    if x.shape != expert.shape:
        yield f"shape {_checks.shape(x)}, the experts have {_checks.shape(expert)}"
    if x.device != expert.device:
        yield f"on {x.device}, experts on {expert.device}"
    if is_dtensor(x) and not is_dtensor(expert):
        yield "a DTensor, the experts have a plain tensor"
    if x.dtype not in _checks.FLOAT_DTYPES:
        yield f"must be fp32, bf16, fp16 or fp64, got {x.dtype}"
    if (reason := not_dense(x)) is not None:
        yield reason

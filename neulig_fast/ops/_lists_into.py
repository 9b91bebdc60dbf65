"""blend_lists_: blend_lists into tensors that are there already."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..tensor_lists import (
    Target,
    TensorLists,
    address_faults,
    as_lists,
    has_memory,
    list_faults,
    not_dense,
)
from . import _lists, _sharded_lists
from .blend_lists import OP, Experts, by_table, prepare, refuse_tangent

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
    lists: Any = as_lists(experts) if not isinstance(experts, TensorLists) else experts.lists
    targets = _targets(outputs)
    found = [] if prepared else list_faults(lists)
    found += _lists.weight_faults(weights, lists) + _grad_faults(targets, weights)
    known = None
    if prepared is not None and isinstance(outputs, TensorLists):
        known = prepared.targets.get(outputs)
    if known is None:
        found += _output_faults(targets, lists[0] if lists else ())
    if not found and prepared is None and _sharded_lists.any_dtensor((targets, *lists)):
        weights, (mine, *theirs) = _sharded_lists.shards("blend_lists_", weights, targets, *lists)
        blend_lists_(mine, weights, theirs)
        return outputs
    table = not found and by_table(weights, experts, lists)
    if table and known is None:
        table = has_memory(targets)
        found += _address_faults(targets, lists) if table else []
    _checks.raise_all("blend_lists_", found)
    refuse_tangent(weights)
    if not table:
        flat = [x.detach() for xs in lists for x in xs]
        for target, result in zip(targets, OP(weights.detach(), flat, None), strict=True):
            target.copy_(result)
        return outputs
    blended = prepared or prepare("blend_lists_", lists)
    into = known or _lists.targets(blended, targets)
    if prepared is not None and isinstance(outputs, TensorLists):
        prepared.targets[outputs] = into
    _write(targets, weights.detach(), blended, into)
    return outputs


def _write(
    targets: Sequence[Tensor], weights: Tensor, lists: TensorLists, into: list[Target]
) -> None:
    args = (weights, lists.flat, None)
    backend = OP.choose(weights.device.type, args)
    if backend == "torch":
        dtypes = [x.dtype for x in targets]
        for dtype in set(dtypes):  # each position is rounded once, to its own dtype
            for target, result in zip(targets, OP.reference(*args[:2], dtype), strict=True):
                if target.dtype == dtype:
                    target.copy_(result)
        return
    _lists.write(backend, weights, into)
    torch.autograd.graph.increment_version([x for x in targets if not x.is_inference()])


def _targets(outputs: Outputs) -> Sequence[Tensor]:
    if not isinstance(outputs, TensorLists):
        return tuple(outputs)
    if outputs.num_experts != 1:
        raise ValueError(f"blend_lists_: outputs must be one list, got {outputs.num_experts}")
    return outputs.lists[0]


def _grad_faults(targets: Sequence[Tensor], weights: Tensor) -> list[str]:
    if not torch.is_grad_enabled():
        return []
    found = [
        f"outputs, position {t}: requires grad and would be overwritten; use torch.no_grad()"
        for t, x in enumerate(targets)
        if isinstance(x, Tensor) and x.requires_grad
    ]
    if weights.requires_grad:
        found.append("weights require grad, which blend_lists_ would not record; detach them")
    return found


def _output_faults(targets: Sequence[Tensor], first: Sequence[Tensor]) -> list[str]:
    found = []
    if len(targets) != len(first):
        found.append(f"outputs must be T = {len(first)} tensors, got {len(targets)}")
    for t, (x, expert) in enumerate(zip(targets, first, strict=False)):
        if not isinstance(x, Tensor):
            found.append(f"outputs, position {t}: a tensor is needed, got {type(x).__name__}")
            continue
        if not isinstance(expert, Tensor):
            continue  # said of the experts
        if x.shape != expert.shape:
            sizes = f"{_checks.shape(x)}, the experts have {_checks.shape(expert)}"
            found.append(f"outputs, position {t}: shape {sizes}")
        if x.device != expert.device:
            found.append(f"outputs, position {t}: on {x.device}, experts on {expert.device}")
        if x.dtype not in _checks.FLOAT_DTYPES:
            found.append(f"outputs, position {t}: must be fp32, bf16, fp16 or fp64, got {x.dtype}")
        if (reason := not_dense(x)) is not None:
            found.append(f"outputs, position {t}: {reason}")
    return found


def _address_faults(targets: Sequence[Tensor], lists: Sequence[Sequence[Tensor]]) -> list[str]:
    """Outputs that overlap an expert or each other, or are misaligned for their type."""
    found = address_faults([targets], "outputs")
    # Every tensor as (first byte, past the last, name), outputs among them: in the order of their
    # first bytes, an output overlaps what comes before it or after it.
    spans = [(x.data_ptr(), x.data_ptr() + x.nbytes, -1, t) for t, x in enumerate(targets)]
    for i, tensors in enumerate(lists):
        spans += [(x.data_ptr(), x.data_ptr() + x.nbytes, i, t) for t, x in enumerate(tensors)]
    spans = sorted(span for span in spans if span[0] < span[1])
    reach: list[tuple[int, int, int, int] | None] = [None, None]  # furthest expert, output so far
    for span in spans:
        is_output = span[2] < 0
        for before in (reach[1], reach[0]) if is_output else (reach[1],):
            if before is not None and span[0] < before[1]:
                found.append(f"{_name(before)} and {_name(span)} overlap in memory")
        furthest = reach[is_output]
        if furthest is None or span[1] > furthest[1]:
            reach[is_output] = span
    return found


def _name(span: tuple[int, int, int, int]) -> str:
    owner = "outputs" if span[2] < 0 else f"expert {span[2]}"
    return f"{owner}, position {span[3]}"

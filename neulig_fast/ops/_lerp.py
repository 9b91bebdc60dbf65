"""lerp_lists' arguments and launches, and lerp_lists_: the same in place."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import _checks
from .._autograd import has_tangent
from .._list_checks import address_faults, are_lists, as_list, has_memory, list_faults
from .._registry import OPS
from ..tensor_lists import Group, TensorLists, held, host, on_device
from . import _lists, _overlap, _sharded_lists
from ._sharded import is_dtensor, whole

Lists = Iterable[Tensor]
Table = tuple[Group, Tensor]  # tensors of one dtype, and the addresses of their results
_STEPS = 2**32  # a word of Philox's counter


def lerp_lists_(
    starts: Lists,
    ends: Lists,
    weight: Tensor | float,
    rounding_seed: int | None = None,
    step: int = 0,
) -> Lists:
    """Move T tensors towards T others, in place; see :func:`neulig_fast.lerp_lists`.

    Args:
        starts: as for ``lerp_lists``; overwritten. They overlap neither each other nor ``ends``.
        ends, weight, rounding_seed, step: as for ``lerp_lists``. Where both lists are DTensors,
            placed alike, each rank moves its own shards; their rounding is to nearest.

    Returns:
        ``starts``. No gradient is recorded.

    Raises:
        ValueError: whatever does not fit, all of it listed; nothing has been written then.
    """
    first, second = as_list(starts), as_list(ends)
    if torch.is_grad_enabled() and isinstance(first, tuple):
        found = [
            f"starts, position {t}: requires grad and would be overwritten; use torch.no_grad()"
            for t, x in enumerate(first)
            if isinstance(x, Tensor) and x.requires_grad
        ]
        _checks.raise_all("lerp_lists_", found)
    if are_lists((first, second)) and _sharded_lists.any_dtensor((first, second)):
        mine, theirs = _shards(first, second, rounding_seed)
        lerp_lists_(mine, theirs, whole(weight), None, step)
        _count_writes(first)
        return starts
    first, second, weight = opened("lerp_lists_", first, second, weight, rounding_seed, step)
    if torch.compiler.is_compiling() or not has_memory([weight, *first, *second]):
        torch.ops.neulig_fast.lerp_lists_.default(
            list(first), list(second), weight, rounding_seed, step
        )
    elif first:
        check_memory(first, second, weight)
        write(weight, first, tables(first, second, first), second, rounding_seed, step)
    return starts


def _shards(
    starts: Sequence[Tensor], ends: Sequence[Tensor], seed: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's tensors of two lists of DTensors."""
    found = [] if seed is None else ["rounding_seed: shards of DTensors are rounded to nearest"]
    _checks.raise_all("lerp_lists_", found + named(list_faults((starts, ends))))
    one = torch.ones((), device=starts[0].device)
    _, mine, (theirs,) = _sharded_lists.shards("lerp_lists_", one, starts, [ends])
    return mine, theirs


def write(
    weight: Tensor,
    starts: Sequence[Tensor],
    into: Sequence[Table],
    ends: Sequence[Tensor],
    seed: int | None,
    step: int,
) -> None:
    """Move ``starts``, whose tables are made and whose memory is known to be apart."""
    op = OPS["lerp_lists"]
    args = (list(starts), list(ends), weight, seed, step)
    backend = _lists.choose(op, weight.device, args)
    if backend == "torch":
        for start, result in zip(starts, op.reference(*args), strict=True):
            start.copy_(result)
    else:
        launch(backend, weight, into, seed, step)
    _count_writes(starts)


def tables(
    starts: Sequence[Tensor], ends: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[Table]:
    """What kernels are given of two lists that fit, and of where their results go."""
    made = []
    for group in TensorLists.of((tuple(starts), tuple(ends))).groups:
        addresses = host([outputs[position].data_ptr() for position in group.positions])
        made.append((group, on_device(addresses, group.device)))
    return made


def launch(
    backend: str, weight: Tensor, into: Iterable[Table], seed: int | None = None, step: int = 0
) -> None:
    """One launch per dtype."""
    for group, outputs in into:
        run, chunk = _lists.room("lerp_lists", backend, group)
        table, chunks = group.table(chunk)
        if chunks:
            w = weight.reshape(1).to(_checks.accumulation_dtype(group.dtype)).resolve_neg()
            run(w, held(table), held(outputs), 0, chunk, chunks, group.dtype, seed, step)


def _count_writes(starts: Sequence[Tensor]) -> None:
    """Tell autograd, which does not see kernels."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([x for x in starts if not x.is_inference()])


# -- what torch.compile and tensors without memory see ---------------------------------------------


@torch.library.custom_op(
    "neulig_fast::lerp_lists_",
    mutates_args=("starts",),
    schema="(Tensor(a!)[] starts, Tensor[] ends, Tensor weight, SymInt? rounding_seed, "
    "SymInt step) -> ()",
)
def _node(
    starts: list[Tensor], ends: list[Tensor], weight: Tensor, seed: int | None, step: int
) -> None:
    """One node of a graph, which runs as eager mode does."""
    _checks.raise_all("lerp_lists_", faults(starts, ends, weight, seed, step))
    if has_memory([weight, *starts, *ends]) and starts:
        check_memory(starts, ends, weight)
        write(weight, starts, tables(starts, ends, starts), ends, seed, step)


@_node.register_fake
def _(
    starts: list[Tensor], ends: list[Tensor], weight: Tensor, seed: int | None, step: int
) -> None:
    _checks.raise_all("lerp_lists_", faults(starts, ends, weight, seed, step))


# -- what is wrong with the arguments --------------------------------------------------------------


def opened(
    name: str, starts: Any, ends: Any, weight: Any, seed: Any, step: Any
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """The lists as tuples and the weight as a tensor; ValueError if anything does not fit."""
    first, second = as_list(starts), as_list(ends)
    if isinstance(weight, (int, float)) and abs(weight) <= sys.float_info.max:
        device = next((x.device for x in first if isinstance(x, Tensor)), "cpu")
        weight = torch.full((), weight, dtype=torch.float64, device=device)
    _checks.raise_all(name, faults(first, second, weight, seed, step))
    from .blend_lists import refuse_transforms

    if forward_ad._current_level >= 0 and any(map(has_tangent, (*first, *second))):
        raise NotImplementedError(f"{name}: no forward-mode derivative")
    refuse_transforms(name, weight, (first, second))
    return first, second, weight


def named(found: Iterable[str]) -> list[str]:
    """Of the lists as they are called here."""
    return [text.replace("expert 0", "starts").replace("expert 1", "ends") for text in found]


def faults(starts: Any, ends: Any, weight: Any, seed: Any = None, step: Any = 0) -> list[str]:
    """What is wrong with the form of the arguments."""
    first, second = as_list(starts), as_list(ends)
    found = named(list_faults((first, second)))
    tensors = [x for xs in (first, second) if isinstance(xs, tuple) for x in xs]
    if any(is_dtensor(x) for x in tensors if isinstance(x, Tensor)):
        found.append("a DTensor among plain tensors; pass to_local() of all of them")
    if not isinstance(weight, Tensor):
        found.append(f"weight must be a finite number or a tensor of one, got {weight!r}")
    elif weight.ndim or not weight.is_floating_point():
        given = f"{_checks.shape(weight)} {weight.dtype}"
        found.append(f"weight must be a floating-point number, shape (), got {given}")
    elif tensors and isinstance(tensors[0], Tensor) and weight.device != tensors[0].device:
        found.append(f"weight must be on {tensors[0].device} like starts, got {weight.device}")
    if seed is not None and not _is_integer(seed, -(2**63), 2**63):
        found.append(f"rounding_seed must be a signed 64-bit integer, got {seed!r}")
    if not _is_integer(step, 0, _STEPS):
        found.append(f"step must be an integer from 0 to 2**32 - 1, got {step!r}")
    return found


def _is_integer(given: Any, least: int, end: int) -> bool:
    return isinstance(given, (int, torch.SymInt)) and bool(least <= given < end)


def check_addresses(starts: Sequence[Tensor], ends: Sequence[Tensor], *_: Any) -> None:
    """ValueError for what only tensors with memory can tell."""
    _checks.raise_all("lerp_lists", named(address_faults([starts, ends])))


def check_memory(starts: Sequence[Tensor], ends: Sequence[Tensor], weight: Tensor) -> None:
    """ValueError where a tensor that is written overlaps another one."""
    found = named(address_faults([starts, ends]))
    spans = _overlap.spans(_overlap.by_address, starts, weight, [ends])
    found += [
        text.replace(_overlap.OUTPUTS, "starts").replace("expert 0", "ends")
        for text in _overlap.faults(spans)
    ]
    _checks.raise_all("lerp_lists_", found)

"""What can be wrong with lists of tensors, each fault by expert and position."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks

Lists = Sequence[Sequence[Tensor]]


def as_lists(experts: Any) -> tuple[tuple[Tensor, ...], ...]:
    """Iterables as tuples; whatever stands in the place of a list stays, for list_faults to see."""
    return tuple(as_list(xs) for xs in experts) if _is_list(experts) else (experts,)


def as_list(tensors: Any) -> Any:
    """An iterable as a tuple, anything else (also a tensor) as it is."""
    return tuple(tensors) if _is_list(tensors) else tensors


def _is_list(given: Any) -> bool:
    return isinstance(given, Iterable) and not isinstance(given, Tensor)


def kind(given: Any) -> str:
    """How a message names what stands in the place of something else."""
    return "a tensor" if isinstance(given, Tensor) else type(given).__name__


def are_lists(lists: Sequence[Any]) -> bool:
    """Whether there are any and each is one; their tensors may still be anything."""
    return len(lists) > 0 and all(isinstance(tensors, tuple) for tensors in lists)


def list_faults(lists: Lists) -> list[str]:
    """What is wrong with the form of N lists of tensors."""
    if not lists:
        return ["experts must be N >= 1 lists of tensors, got none"]
    if not are_lists(lists):
        other = next(xs for xs in lists if not isinstance(xs, tuple))
        return [f"experts must be lists of tensors, got {kind(other)} for a list"]
    count = len(lists[0])
    found = [
        f"expert {i} has {len(tensors)} tensors, expert 0 has {count}"
        for i, tensors in enumerate(lists)
        if len(tensors) != count
    ]
    first = next((x for xs in lists for x in xs if isinstance(x, Tensor)), None)
    for t, tensors in enumerate(zip(*lists, strict=False)):
        found += _position_faults(t, tensors, first)
    return found


def _position_faults(t: int, tensors: Sequence[Tensor], first: Tensor | None) -> list[str]:
    alike = tensors[0]
    if first is None or not isinstance(alike, Tensor):
        return [f"expert 0, position {t}: a tensor is needed, got {kind(alike)}"]
    shape, dtype, device, found = alike.shape, alike.dtype, first.device, []
    if dtype not in _checks.FLOAT_DTYPES:
        found.append(f"position {t}: experts must be fp32, bf16, fp16 or fp64, got {dtype}")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            found.append(f"expert {i}, position {t}: a tensor is needed, got {kind(x)}")
            continue
        if x.shape != shape:
            sizes = f"{_checks.shape(x)}, expert 0 has {_checks.shape(alike)}"
            found.append(f"expert {i}, position {t}: shape {sizes}")
        if x.dtype != dtype:
            found.append(f"expert {i}, position {t}: {x.dtype}, expert 0 has {dtype}")
        if x.device != device:
            found.append(f"expert {i}, position {t}: on {x.device}, others on {device}")
        if (reason := not_dense(x)) is not None:
            found.append(f"expert {i}, position {t}: {reason}")
    return found


def not_dense(tensor: Tensor) -> str | None:
    """Why kernels cannot read ``tensor`` as one run of elements; None when they can."""
    if tensor.layout is not torch.strided:
        return f"a {tensor.layout} tensor, not a dense one"
    if not tensor.is_contiguous():
        return f"not contiguous (strides {tuple(tensor.stride())}); make it so with .contiguous()"
    if not torch.compiler.is_compiling() and tensor.is_neg():  # in a graph torch resolves them
        return "a negated view, whose memory has the other sign; make it plain with .resolve_neg()"
    return None


def has_memory(tensors: Iterable[Tensor]) -> bool:
    """Whether kernels can be pointed to all of them: no meta or fake tensors, no wrappers."""
    plain = Tensor.__torch_dispatch__
    tensors = list(tensors)
    return all(kind.__torch_dispatch__ is plain for kind in {type(x) for x in tensors}) and (
        {x.device.type for x in tensors} <= {"cpu", "cuda"}
    )


def memory_faults(lists: Lists) -> list[str]:
    """The first tensor that has no memory of its own, where there is one."""
    if has_memory(x for xs in lists for x in xs):
        return []
    i, t = next(
        (i, t) for i, xs in enumerate(lists) for t, x in enumerate(xs) if not has_memory([x])
    )
    x = lists[i][t]
    return [
        f"expert {i}, position {t}: a plain tensor with memory on cpu or cuda is needed, got a "
        f"{type(x).__name__} on {x.device}; blend_lists takes lists of such tensors as they are"
    ]


def address_faults(lists: Lists, name: str = "expert {}") -> list[str]:
    """What is wrong with where the tensors are, which only tensors with memory can tell."""
    return [
        f"{name.format(i)}, position {t}: its address is no multiple of its element's size"
        for i, tensors in enumerate(lists)
        for t, x in enumerate(tensors)
        if x.data_ptr() % x.itemsize
    ]

"""What the replacements ask of a call before they take it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..._autograd import has_tangent
from ..._checks import FLOAT_DTYPES
from ...tensor_lists import TensorLists
from .._seam import Unsupported


def check_mode(*tensors: Tensor) -> None:
    """Unsupported where something other than plain eager mode runs, or differentiates forwards."""
    if torch.compiler.is_compiling():
        raise Unsupported("torch.compile")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Unsupported("torch.func")
    if any(map(has_tangent, tensors)):
        raise Unsupported("a forward-mode derivative")


def check(tensors: Iterable[Tensor], grad: bool = False) -> None:
    """Unsupported for tensors that the ops do not read as they are.

    ``grad``: whether what needs a gradient is taken.
    """
    for x in tensors:
        if (reason := _unfit(x)) is not None:
            raise Unsupported(reason)
        if not grad and x.requires_grad and torch.is_grad_enabled():
            raise Unsupported("a gradient")


def _unfit(x: Any) -> str | None:
    if not isinstance(x, Tensor):
        return "something else than tensors"
    if x.layout is not torch.strided:
        return "sparse tensors"
    if type(x).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return "tensors of a subclass"
    if x.device.type not in ("cpu", "cuda"):
        return "tensors without memory, or on an unknown device"
    if x.dtype not in FLOAT_DTYPES:
        return "tensors that are no fp32, bf16, fp16 or fp64"
    if not x.is_contiguous() or x.is_neg():
        return "strided tensors"
    return None


def as_lists(lists: Sequence[Sequence[Tensor]]) -> TensorLists:
    """N lists of T tensors for ``blend_lists``; Unsupported where they do not fit."""
    check_mode()
    for tensors in lists:
        check(tensors)
    for alike in zip(*lists, strict=True):
        if len({x.shape for x in alike}) > 1:
            raise Unsupported("tensors of several shapes")
        if len({x.dtype for x in alike}) > 1:
            raise Unsupported("tensors of several dtypes")
    if len({x.device for tensors in lists for x in tensors}) > 1:
        raise Unsupported("tensors on several devices")
    return TensorLists.of(tuple(map(tuple, lists)))


def check_wide(tensors: Iterable[Tensor]) -> None:
    """Unsupported for 16-bit types: where the original rounds, fp32 sums do not."""
    if any(x.dtype.itemsize < 4 for x in tensors):
        raise Unsupported("16-bit tensors, which the original rounds at every step")


def check_finite(tensor: Tensor) -> None:
    """Unsupported for NaN and infinities."""
    # A sum is one read of memory; it may overflow where all are finite.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise Unsupported("values that are not finite")


def same_names(named: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of N dictionaries of tensors; Unsupported unless all have the same ones."""
    if not named or any(type(each).__getitem__ is not dict.__getitem__ for each in named):
        raise Unsupported("no dictionaries of tensors")  # lazy ones read files at every look
    names = list(named[0])
    if any(each.keys() != named[0].keys() for each in named):
        raise Unsupported("dictionaries of several lists of names")
    return names

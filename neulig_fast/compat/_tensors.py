"""What replacements ask of the tensors of a call before they take it, the same for all hosts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._autograd import has_tangent
from .._checks import FLOAT_DTYPES
from ._seam import Unsupported


def check_mode() -> None:
    """Unsupported where something other than plain eager mode runs."""
    if torch.compiler.is_compiling():
        raise Unsupported("torch.compile")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Unsupported("torch.func")


def check_plain(*tensors: Tensor, strided: bool = False, grad: bool = False) -> None:
    """Unsupported unless all are dense, contiguous floats on one device, in plain eager mode, and
    none asks for a gradient. ``strided``: whether they may have any strides; ``grad``: whether
    they may ask for a gradient backwards."""
    check_mode()
    for tensor in tensors:
        if (reason := _unfit(tensor)) is not None:
            raise Unsupported(reason)
        if not strided and not tensor.is_contiguous():
            raise Unsupported("strided tensors")
        if has_tangent(tensor):
            raise Unsupported("a forward-mode derivative")
        if not grad and tensor.requires_grad and torch.is_grad_enabled():
            raise Unsupported("a gradient")
    if len({tensor.device for tensor in tensors}) > 1:
        raise Unsupported("tensors on several devices")


def check_alike(tensors: Iterable[Tensor], strided: bool = False) -> None:
    """The same, and Unsupported unless there are some, all of one shape and dtype, with
    elements."""
    tensors = list(tensors)
    check_plain(*tensors, strided=strided)
    check_one_form(tensors)
    if not tensors:
        raise Unsupported("no tensors")
    if not tensors[0].numel():
        raise Unsupported("no elements")


def check_one_form(tensors: Iterable[Tensor]) -> None:
    """Unsupported unless all have one shape and one dtype."""
    tensors = list(tensors)
    if len({tensor.shape for tensor in tensors}) > 1:
        raise Unsupported("tensors of several shapes")
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise Unsupported("tensors of several dtypes")


def check_finite(*tensors: Tensor, below: float = torch.inf) -> None:
    """Unsupported for NaN, and for magnitudes that are not ``below``."""
    for tensor in tensors:
        if tensor.numel():
            low, high = tensor.detach().aminmax()
            if not -below < float(low) <= float(high) < below:
                raise Unsupported("values that are not finite")


def check_ranked(merged: Tensor) -> None:
    """Unsupported for NaN in what was merged of the largest elements: sorts rank it above all
    numbers, of which fewer are then kept; here it has no rank, and always gets through."""
    if merged.numel() and merged.aminmax().min.isnan():
        raise Unsupported("NaN, which takes the place of a number among the largest")


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
    if x.is_neg():
        return "negated views"
    if x.data_ptr() % x.itemsize:
        return "tensors whose address is no multiple of their elements' size"
    return None

"""What replacements ask of the tensors of a call before they take it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._autograd import has_tangent
from .._checks import FLOAT_DTYPES
from ._seam import Unsupported


def check_plain(*tensors: Tensor, strided: bool = False) -> None:
    """Unsupported unless all are dense, contiguous floats on one device, in plain eager mode, and
    none asks for a gradient. ``strided``: whether they may have any strides."""
    if torch.compiler.is_compiling():
        raise Unsupported("torch.compile")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise Unsupported("torch.func")
    for tensor in tensors:
        if (reason := _unfit(tensor)) is not None:
            raise Unsupported(reason)
        if not strided and (not tensor.is_contiguous() or tensor.is_neg()):
            raise Unsupported("strided tensors")
        if has_tangent(tensor) or (tensor.requires_grad and torch.is_grad_enabled()):
            raise Unsupported("a gradient")
    if len({tensor.device for tensor in tensors}) > 1:
        raise Unsupported("tensors on several devices")


def check_alike(tensors: Iterable[Tensor], strided: bool = False) -> None:
    """The same, and Unsupported unless all have one shape and one dtype, and elements."""
    tensors = list(tensors)
    check_plain(*tensors, strided=strided)
    if len({tensor.shape for tensor in tensors}) > 1:
        raise Unsupported("tensors of several shapes")
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise Unsupported("tensors of several dtypes")
    if not tensors[0].numel():
        raise Unsupported("no elements")


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
    return None

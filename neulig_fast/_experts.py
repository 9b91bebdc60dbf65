"""What ExpertPool asks of the experts it is given, and every way they can fail to be alike."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from . import _checks
from .segments import Kind

# Buffers by the names BatchNorm gives them: all there is to go by without a module.
BATCH_NORM_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_COUNT_BLOCK = 1 << 20  # elements; keeps the masks of the error path at a megabyte

Expert: TypeAlias = nn.Module | Mapping[str, torch.Tensor]


def tensors_of(expert: Expert) -> dict[str, Any]:
    """The state dict of an expert, as a new dict of the very tensors (not detached)."""
    return dict(expert.state_dict(keep_vars=True) if isinstance(expert, nn.Module) else expert)


def kinds(template: nn.Module | None, names: Sequence[str]) -> dict[str, Kind]:
    """Parameter or buffer: what the template says, else by BatchNorm's buffer names."""
    if template is None:
        buffers = {name for name in names if name.rpartition(".")[2] in BATCH_NORM_BUFFERS}
    else:
        parameters = {name for name, _ in template.named_parameters(remove_duplicate=False)}
        buffers = set(names) - parameters
    return {name: "buffer" if name in buffers else "parameter" for name in names}


def check_arguments(
    experts: Sequence[Expert],
    template: nn.Module | None,
    names: Sequence[str] | None,
    dtype: torch.dtype | None,
    consume: bool,
    subject: str = "ExpertPool",
) -> None:
    """TypeError or ValueError for arguments that cannot be experts at all; reads no tensor."""
    for i, expert in enumerate(experts):
        if not isinstance(expert, (nn.Module, Mapping)):
            got = type(expert).__name__
            raise TypeError(f"{subject}: experts[{i}] must be a module or a state dict, got {got}")
    if template is not None and not isinstance(template, nn.Module):
        got = type(template).__name__
        raise TypeError(f"{subject}: template must be a torch.nn.Module or None, got {got}")
    found = [] if experts else ["needs at least one expert, got none"]
    if isinstance(names, str):
        found.append(f"names must be a list of names, got the string {names!r}")
    elif names is not None and len(names) != len(experts):
        found.append(
            f"needs one name per expert, got {len(names)} names for {len(experts)} experts"
        )
    if names is not None and len(set(names)) != len(names):
        twice = sorted({name for name in names if list(names).count(name) > 1})
        found.append(f"names must differ, got more than one {', '.join(map(repr, twice))}")
    if dtype is not None and dtype not in _checks.FLOAT_DTYPES:
        found.append(f"dtype must be fp32, bf16, fp16 or fp64, got {dtype}")
    if consume:
        found.extend(_cannot_consume(experts))
    _checks.raise_all(subject, found)


def _cannot_consume(experts: Sequence[Expert]) -> list[str]:
    found: list[str] = []
    seen: dict[int, int] = {}
    for i, expert in enumerate(experts):
        if isinstance(expert, Mapping) and not isinstance(expert, MutableMapping):
            found.append(f"consume=True empties state dicts, but experts[{i}] is read-only")
        if id(expert) in seen:
            found.append(f"consume=True, but experts[{i}] is experts[{seen[id(expert)]}] again")
        seen.setdefault(id(expert), i)
    return found


def arena_dtype(expert: Expert) -> torch.dtype:
    """The narrowest supported dtype that holds every float tensor of the expert."""
    found: torch.dtype | None = None
    for tensor in tensors_of(expert).values():
        if isinstance(tensor, torch.Tensor) and tensor.dtype in _checks.FLOAT_DTYPES:
            found = tensor.dtype if found is None else torch.promote_types(found, tensor.dtype)
    return found or torch.get_default_dtype()


def check_tensors(
    experts: Sequence[Expert],
    labels: Sequence[str],
    template: nn.Module | None,
    dtype: torch.dtype,
    subject: str = "ExpertPool",
) -> None:
    """ValueError listing every tensor of every expert that cannot go into one arena of ``dtype``.

    Reads each float tensor once (its extremes) and allocates nothing of its size.
    """
    first = tensors_of(experts[0])
    model, whose = first, labels[0]
    if template is not None and template is not experts[0]:
        model, whose = tensors_of(template), "the template"
    found = []
    for expert, label in zip(experts, labels, strict=True):
        tensors = tensors_of(expert)
        lacks = [name for name in model if name not in tensors]
        extra = [name for name in tensors if name not in model]
        faults = [(f"{label} lacks ", str(name), f", which {whose} has") for name in lacks]
        faults += [(f"{label} has ", str(name), f", which {whose} lacks") for name in extra]
        found += _checks.one_line_each(faults)
        if isinstance(expert, nn.Module) and template is not None and expert is not template:
            found += _other_code(expert, template, label, whose)
        faults = [
            (f"{label}: ", str(name), f" {fault}")
            for name, tensor in tensors.items()
            for fault in _faults(
                name, tensor, model.get(name), whose, first.get(name), labels[0], dtype
            )
        ]
        found += _checks.one_line_each(faults)
    if not found and not any(tensor.is_floating_point() for tensor in first.values()):
        found.append("the experts hold no float tensors (P = 0)")
    _checks.raise_all(subject, found)


def _other_code(expert: nn.Module, model: nn.Module, label: str, whose: str) -> list[str]:
    """What ``model`` would run otherwise than ``expert`` does, the state dict being equal."""
    mine, theirs = _submodules(expert), _submodules(model)
    found = [
        f"{name or 'the module'} is {mine.get(name, 'missing')}, {whose}: "
        f"{theirs.get(name, 'missing')}"
        for name in theirs | mine
        if mine.get(name) != theirs.get(name)
    ]
    own, others = _unsaved_buffers(expert), _unsaved_buffers(model)
    found += [
        f"{name}, a buffer that is not saved, differs from that of {whose}"
        for name in others | own
        if name not in own or name not in others or not _same(own[name], others[name])
    ]
    advice = "; if that does not matter, give the module's state_dict()" if found else ""
    return [f"{label}: {fault}{advice}" for fault in found]


def _submodules(module: nn.Module) -> dict[str, str]:
    """Path -> type, with the settings that torch's own modules show."""
    shown = {}
    for path, part in module.named_modules(remove_duplicate=False):
        kind = f"{type(part).__module__}.{type(part).__qualname__}"
        if isinstance(part, (nn.Identity, _DropoutNd)):
            kind = "nn.Identity or dropout"  # the same in eval mode
        elif kind.startswith("torch.nn."):
            kind = f"nn.{type(part).__qualname__}({part.extra_repr()})"
        shown[path] = kind
    return shown


def _unsaved_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    saved = module.state_dict()
    buffers = module.named_buffers(remove_duplicate=False)
    return {name: buffer for name, buffer in buffers if name not in saved}


def _same(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    if mine.shape != theirs.shape or mine.is_meta or theirs.is_meta:
        return False
    return torch.equal(theirs.to(mine.device, mine.dtype), mine)


def _faults(
    name: Any, tensor: Any, model: Any, whose: str, first: Any, label: str, dtype: torch.dtype
) -> list[str]:
    """Everything wrong with one tensor, beside the model's and expert 0's of the same name."""
    unusable = _unusable(name, tensor)
    if unusable:
        return [unusable]
    faults = [_other_shape(tensor, model, whose), _other_dtype(tensor, first, label)]
    if tensor.is_floating_point():
        faults.append(_not_finite(tensor.detach(), dtype))
    return [fault for fault in faults if fault]


def _unusable(name: Any, tensor: Any) -> str | None:
    if not isinstance(name, str):
        return f"is the key of a tensor but a {type(name).__name__}, not a string"
    if not isinstance(tensor, torch.Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if nn.parameter.is_lazy(tensor):
        return "has no shape yet (lazy module): run one batch through the module first"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout)
        return f"is {kind}; only dense tensors can be blended"
    if tensor.device.type == "meta":
        return "is on the meta device and has no values"
    inexact = tensor.is_floating_point() or tensor.is_complex()
    if inexact and tensor.dtype not in _checks.FLOAT_DTYPES:
        return f"has dtype {tensor.dtype}; fp32, bf16, fp16 and fp64 can be blended"
    return None


def _other_shape(tensor: torch.Tensor, model: Any, whose: str) -> str | None:
    if not isinstance(model, torch.Tensor) or nn.parameter.is_lazy(model):
        return None
    if tensor.shape == model.shape:
        return None
    return f"has shape {_checks.shape(tensor)}, {whose} has {_checks.shape(model)}"


def _other_dtype(tensor: torch.Tensor, first: Any, whose: str) -> str | None:
    if not isinstance(first, torch.Tensor) or tensor.dtype == first.dtype:
        return None
    return f"has dtype {tensor.dtype}, {whose} has {first.dtype}"


def _not_finite(tensor: torch.Tensor, dtype: torch.dtype) -> str | None:
    if tensor.numel() == 0:
        return None
    # NaN passes through aminmax, so two numbers answer for the whole tensor in one read.
    extremes = torch.stack(torch.aminmax(tensor)).cpu()
    if bool(extremes.to(dtype).isfinite().all()):
        return None
    if bool(extremes.isfinite().all()):
        low, high = extremes.tolist()
        return f"has values from {low:g} to {high:g}, which overflow {dtype}"
    blocks = tensor.reshape(-1).split(_COUNT_BLOCK)
    nan = sum(int(block.isnan().sum()) for block in blocks)
    inf = sum(int(block.isinf().sum()) for block in blocks)
    return f"has {nan} NaN and {inf} infinite values among {tensor.numel()}"


def return_freed_memory() -> None:
    """Hand freed heap pages back to the system, where the C library is glibc.

    It keeps freed blocks of up to 32 MB for reuse otherwise, which would spoil what ``consume``
    promises.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(ctypes.c_size_t(0))

"""Arithmetic of state dicts: sums, averages, interpolations, in one pass over all models.

Tensors that are no floats, BatchNorm's counters say, go through the original by themselves.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...ops.blend_lists import blend_lists
from ...tensor_lists import TensorLists
from .._seam import Seam, Unsupported
from ._tensors import as_lists, check_wide, same_names

_MODULE = "fusion_bench.utils.state_dict_arithmetic"
_States = Sequence[Mapping[str, Tensor]]


def seams() -> list[Seam]:
    """Of the functions that read several models. Those of one or two read and write no more than
    they must."""
    functions: tuple[Callable[..., Any], ...] = (
        state_dict_sum, state_dict_avg, state_dict_interpolation, state_dict_weighted_sum,
    )  # fmt: skip
    return [Seam(f"{_MODULE}:{f.__name__}", partial(f, True), partial(f, False)) for f in functions]


def state_dict_sum(exact: bool, state_dicts: _States) -> dict[str, Tensor]:
    """Their sum."""
    return _blended(exact, state_dicts, [1.0] * len(state_dicts), "state_dict_sum")


def state_dict_avg(exact: bool, state_dicts: _States) -> dict[str, Tensor]:
    """Their mean; to the bit, the sum divided by N as the original divides."""
    count = len(state_dicts)
    if not exact:
        return _blended(exact, state_dicts, [1 / max(1, count)] * count, "state_dict_avg")
    if len(_floats(state_dicts)[0]) < len(state_dicts[0]):
        raise Unsupported("tensors that are no fp32, bf16, fp16 or fp64")
    total = _blended(exact, state_dicts, [1.0] * count, "state_dict_avg")
    for tensor in total.values():
        tensor /= count
    return total


def state_dict_interpolation(
    exact: bool, state_dicts: _States, scalars: Sequence[float]
) -> dict[str, Tensor]:
    """Their weighted sum; weights of zero count, as far as NaN goes."""
    return _blended(exact, state_dicts, scalars, "state_dict_interpolation")


def state_dict_weighted_sum(
    exact: bool, state_dicts: _States, weights: Sequence[float], device: Any = None
) -> dict[str, Tensor]:
    """Their weighted sum; a model of weight zero takes no part."""
    if len(state_dicts) != len(weights):
        raise Unsupported("weights of another number than the models")
    _floats(state_dicts)  # also those of weight zero must fit
    used = [(s, w) for s, w in zip(state_dicts, weights, strict=True) if w != 0]
    if not used:
        raise Unsupported("weights that are all zero")
    states, rest = zip(*used, strict=True)
    merged = _blended(exact, states, rest, "state_dict_weighted_sum")
    if device is not None:
        merged = OrderedDict((k, x.to(device, non_blocking=True)) for k, x in merged.items())
    return merged


def _blended(exact: bool, states: _States, weights: Sequence[float], name: str) -> Any:
    if len(states) != len(weights) or not all(isinstance(w, (int, float)) for w in weights):
        raise Unsupported("weights that are not one number a model")
    names = same_names(states)
    floats, lists = _floats(states)
    if exact:
        check_wide(lists.flat)
    fast = set(floats)
    others = [{k: state[k] for k in names if k not in fast} for state in states]
    rest: Mapping[str, Tensor] = {}
    if others[0]:
        args = () if name in ("state_dict_sum", "state_dict_avg") else (weights,)
        rest = getattr(importlib.import_module(_MODULE), name)(others, *args)
    numbers = torch.tensor(weights, dtype=torch.float64, device=lists.device)
    with torch.no_grad():
        merged = dict(zip(floats, blend_lists(numbers, lists), strict=True))
    return OrderedDict((k, merged[k] if k in merged else rest[k]) for k in names)


def _floats(states: _States) -> tuple[list[str], TensorLists]:
    """The names of tensors of floats, and the models' tensors."""
    names = same_names(states)
    floats = [k for k in names if isinstance(x := states[0][k], Tensor) and x.is_floating_point()]
    if not floats:
        raise Unsupported("tensors that are no fp32, bf16, fp16 or fp64")
    return floats, as_lists([[state[k] for k in floats] for state in states])

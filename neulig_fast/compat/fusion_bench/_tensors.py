"""What FusionBench's functions take beside tensors: lists and dictionaries of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ...tensor_lists import TensorLists
from .._seam import Unsupported
from .._tensors import check_one_form, check_plain


def as_lists(lists: Sequence[Sequence[Tensor]]) -> TensorLists:
    """N lists of T tensors for ``blend_lists``; Unsupported where they do not fit."""
    check_plain(*(tensor for tensors in lists for tensor in tensors))
    for alike in zip(*lists, strict=True):
        check_one_form(alike)
    return TensorLists.of(tuple(map(tuple, lists)))


def check_wide(tensors: Iterable[Tensor]) -> None:
    """Unsupported for 16-bit types: where the original rounds, fp32 sums do not."""
    if any(x.dtype.itemsize < 4 for x in tensors):
        raise Unsupported("16-bit tensors, which the original rounds at every step")


def same_names(named: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of N dictionaries of tensors; Unsupported unless all have the same ones."""
    if not named or not all(_is_dictionary(each) for each in named):
        raise Unsupported("no dictionaries of tensors")
    names = list(named[0])
    if any(each.keys() != named[0].keys() for each in named):
        raise Unsupported("dictionaries of several lists of names")
    return names


def _is_dictionary(given: Any) -> bool:
    """Lazy ones read files at every look."""
    return isinstance(given, dict) and type(given).__getitem__ is dict.__getitem__

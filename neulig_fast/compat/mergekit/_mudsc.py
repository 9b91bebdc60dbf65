"""MuDSC as a merge method of mergekit: the mean of models whose units an alignment has matched.

merge_method: mudsc
parameters:
  alignment: file       # of Alignment.save, or alignment.safetensors of `neulig-fast align`
  prefix: visual.       # of the tensors that were aligned, where they are a part of the models
models: [...]           # in the order in which they were aligned

Matching needs whole networks and their activations, and is done before; a merge needs no more of
them than one tensor at a time.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..._registry import NeuligFastWarning
from ...alignment import Alignment

_warned: set[tuple[str, str, str]] = set()  # alignment, prefix, start of the names


def method() -> Any:
    """The method, as mergekit's registry holds it."""
    base = importlib.import_module("mergekit.merge_methods.base")
    define = importlib.import_module("mergekit.merge_methods.easy_define")

    def merge(group: Any, alignment: str, prefix: str = "") -> Tensor:
        tensors = [entry.tensor for entry in group.entries]
        return mudsc(group.metadata.name, tensors, alignment, prefix)

    # mergekit reads what a method takes from its annotations.
    given = {"alignment": str, "prefix": str}
    merge.__annotations__ = {"group": base.TensorGroup, **given, "return": Tensor}
    url = "https://arxiv.org/abs/2403.01753"
    return define.merge_method(name="mudsc", pretty_name="MuDSC", reference_url=url)(merge)


def mudsc(name: str | None, tensors: Sequence[Tensor], alignment: str, prefix: str) -> Tensor:
    """The mean of one tensor of N models, their units as matched.

    Args:
        name: of the tensor. One without ``prefix`` is averaged as it is, with a warning where the
            end of its name is an aligned tensor's: once for all that begin alike.
        tensors: the models', of one shape, in the order of the alignment's networks.
        alignment: a file of :meth:`Alignment.save`.
        prefix: of the aligned tensors' names, which the alignment does not have; ends with a dot.

    Raises:
        ValueError: no name; a file of something else; another number of models, or a shape that
            the alignment does not fit; a prefix that is missing or lacks its dot.
        FileNotFoundError: no such file.
    """
    if name is None:
        raise ValueError("mudsc: the name of the tensor must be given")
    if prefix and not prefix.endswith("."):
        raise ValueError(f"mudsc: prefix must end with a dot, got {prefix!r}")
    found = _read(alignment, Path(alignment).stat().st_mtime_ns)
    uses_in = found.spec.uses_in
    own = name.removeprefix(prefix) if name.startswith(prefix) else ""
    if not uses_in(own):
        _check_prefix(name, found, alignment, prefix)
        own = "" if uses_in(name) else name  # without the prefix it is of another part
    return found.merge_tensor(own, tensors)


@functools.lru_cache(maxsize=2)
def _read(path: str, _changed: int) -> Alignment:
    return Alignment.load(path)


def _check_prefix(name: str, found: Alignment, alignment: str, prefix: str) -> None:
    """For what looks like an aligned tensor, but for the start of its name: a ValueError where no
    prefix is given, else a warning, for it may be of another part that is built alike."""
    for use in found.spec.uses:
        if not f".{name}".endswith(f".{use.tensor}"):
            continue
        start = name.removesuffix(use.tensor)
        if not prefix:
            raise ValueError(
                f"mudsc: {use.tensor} is aligned, got {name}: prefix must be {start!r}"
            )
        if (alignment, prefix, start) not in _warned:
            _warned.add((alignment, prefix, start))
            text = f"mudsc: {name} is averaged as it is; prefix is {prefix!r}"
            warnings.warn(text, NeuligFastWarning, stacklevel=3)
        return

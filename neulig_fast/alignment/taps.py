"""Seeing the activations of a spec's units while a network runs.

A node is seen wherever it is consumed, at the input of every weight with a use ``in``; a node that
nothing consumes (queries and keys) where its weights produce it. Weights are found by their memory
in the arguments of matrix products and convolutions, below ``torch.nn``: attention hands its output
projection to a function, and no hook of a module would ever see its input.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .spec import Spec, Use

aten = torch.ops.aten
# Positions of the input, of the weight and of the bias among the arguments.
_OPERANDS: dict[Any, tuple[int, int, int | None]] = {
    aten.mm.default: (0, 1, None),
    aten.bmm.default: (0, 1, None),
    aten.addmm.default: (1, 2, 0),
    aten.baddbmm.default: (1, 2, 0),
    aten.convolution.default: (0, 1, 2),
}


class Part(NamedTuple):
    """A named tensor that another is a view of, from row ``first`` of the named one on."""

    name: str
    first: int


class Layers(TorchDispatchMode):
    """While it is entered, ``product`` sees every layer that computes with one of the tensors.

    Args:
        tensors: by name; each is recognised by its memory.
    """

    _atoms: ClassVar[set[Any]] = set()  # operators found to consist of no others

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        self._regions = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, name)
            for name, tensor in self.tensors.items()
        )

    def __enter__(self) -> Any:
        # Attention's fast path is one operator, in which no projection could be seen.
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.backends.mha.set_fastpath_enabled(self._fastpath)
        super().__exit__(*error)

    def product(self, x: Tensor, part: Part, bias: Part | None, result: Tensor) -> Tensor:
        """Called with the channels of ``x`` and ``result`` last; returns what counts as result."""
        raise NotImplementedError

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func not in _OPERANDS:
            return self._apart(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        x, weight, bias = (None if at is None else args[at] for at in _OPERANDS[func])
        shift = next(self._parts(bias), None) if isinstance(bias, Tensor) else None
        convolves = func is aten.convolution.default
        for part in self._parts(weight):
            if not convolves:
                result = self.product(x, part, shift, result)
                continue
            last = self.product(_channels_last(x), part, shift, _channels_last(result))
            result = last.transpose(1, 2).reshape(result.shape)
        return result

    def _apart(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """The result of an operator; of one that consists of others, by these, one after the other.

        In inference mode linear layers and convolutions arrive whole.
        """
        if func not in self._atoms:
            super().__enter__()
            try:
                result = func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
            if result is not NotImplemented:
                return result
            self._atoms.add(func)
        return func(*args, **kwargs)

    def _parts(self, tensor: Tensor) -> Iterator[Part]:
        at = tensor.data_ptr()
        k = bisect_right(self._regions, (at, float("inf"), ""))
        for start, stop, name in self._regions[max(k - 1, 0) : k]:
            if at < stop:
                of = self.tensors[name]
                first = (at - start) // (max(of.stride(0), 1) * of.element_size()) if of.ndim else 0
                tied = (other for begin, _, other in self._regions if begin == start)
                yield from (Part(other, first) for other in tied)


def _channels_last(x: Tensor) -> Tensor:
    """(B, S, C) of (B, C, ...), a view."""
    return x.flatten(2).transpose(1, 2)


class Taps(Layers):
    """While it is entered, ``see(use, rows)`` is called for every activation of the spec's units.

    ``rows`` (T, units) or (B, T, units) is a view of the activation, of any strides.
    """

    def __init__(
        self, spec: Spec, tensors: Mapping[str, Tensor], see: Callable[[Use, Tensor], None]
    ) -> None:
        self._spec, self._see = spec, see
        self._taps: dict[str, list[Use]] = {}
        for node in spec.nodes:
            for use in taps_of(spec, node):
                self._taps.setdefault(use.tensor, []).append(use)
        super().__init__({name: tensors[name] for name in self._taps})

    def product(self, x: Tensor, part: Part, bias: Part | None, result: Tensor) -> Tensor:
        for use in self._taps[part.name]:
            rows = self._rows(use, x if use.role == "in" else result, part)
            if rows is not None:
                self._see(use, rows)
        return result

    def _rows(self, use: Use, seen: Tensor, part: Part) -> Tensor | None:
        start, stop = self._spec.span(use)
        if use.role == "in" and seen.shape[-1] != self.tensors[use.tensor].shape[use.axis]:
            return None  # a grouped convolution, whose inputs are not the weight's columns
        if use.role == "out":
            start, stop = start - part.first, stop - part.first
        if start < 0 or stop > seen.shape[-1]:
            return None  # another part of a fused projection
        rows = seen[..., start:stop]
        if use.repeat > 1:
            rows = rows.unflatten(-1, (-1, use.repeat)).movedim(-2, -1)
        return rows.reshape(-1, rows.shape[-1]) if rows.ndim > 3 else rows


def taps_of(spec: Spec, node: str) -> tuple[Use, ...]:
    """The uses at which a node is seen."""
    uses = [use for use in spec.uses_of(node) if not use.inner]
    consumed = tuple(use for use in uses if use.role == "in")
    return consumed or tuple(use for use in uses if use.role == "out")

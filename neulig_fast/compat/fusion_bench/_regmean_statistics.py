"""RegMean's statistics, gathered by FusionBench's own hooks: X^T X of the inputs of a layer.

The hooks are made inside of longer methods, which are given the layers to hook. They get stand-ins
for them here, which hook in the original's place what makes the product cheaper: it is symmetric,
so that little more than half of it is multiplied; and of layers that were given one input, as the
projections of an attention are, it is made once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._seam import Seam

_METHOD = "fusion_bench.method"
_CLASSES = (
    f"{_METHOD}.regmean.clip_regmean:RegMeanAlgorithmForCLIP",
    f"{_METHOD}.regmean.gpt2_regmean:RegMeanAlgorithmForGPT2",
    f"{_METHOD}.regmean_plusplus.clip_regmean_plusplus:RegMeanAlgorithmForCLIPPlusPlus",
)
_LAYERS = "linear_modules_to_merge"
_WIDTH = 192  # of the blocks of columns that are multiplied


def seams() -> list[Seam]:
    """Of RegMean for CLIP and GPT-2 and of RegMean++."""
    found = []
    for where in _CLASSES:
        module, name = where.split(":")
        original = getattr(importlib.import_module(module), name).get_regmean_weights
        found.append(Seam(f"{where}.get_regmean_weights", None, _gathered(original)))
    return found


def _gathered(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def get_regmean_weights(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
        bound, squares = signature.bind(*args, **kwargs), _Squares()
        layers = bound.arguments[_LAYERS]
        bound.arguments[_LAYERS] = {k: _StandIn(layer, squares) for k, layer in layers.items()}
        result: dict[str, Tensor] = original(*bound.args, **bound.kwargs)
        return result

    return get_regmean_weights


class _StandIn:
    """A layer to those who hook it."""

    def __init__(self, layer: nn.Module, squares: _Squares) -> None:
        self._layer, self._squares = layer, squares

    def register_forward_hook(self, hook: Callable[..., Any]) -> Any:
        """``hook``, with the product made here."""
        squares = self._squares

        def watched(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Any:
            with squares.of(given[0]):
                return hook(module, given, output)

        return self._layer.register_forward_hook(watched)


class _Squares(TorchFunctionMode):
    """While it is active, a product of a matrix's transpose and the matrix is made once for one
    input, from blocks on and above the diagonal."""

    def __init__(self) -> None:
        super().__init__()
        self._input: Tensor | None = None
        self._version = -1
        self._square: Tensor | None = None

    def of(self, given: Tensor) -> _Squares:
        """Itself; what was made of another input, or before this one changed, is forgotten."""
        version = -1 if given.is_inference() else given._version
        if given is not self._input or version != self._version or version < 0:
            self._input, self._version, self._square = given, version, None
        return self

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.matmul or kwargs or not _is_square(*args):
            return func(*args, **(kwargs or {}))
        if self._square is None:
            self._square = _square(args[1]) if _pays(args[1]) else func(*args)
        return self._square


def _is_square(left: Tensor, right: Tensor) -> bool:
    """Whether it is x^T and x."""
    return (
        type(left) is type(right) is Tensor
        and left.layout is right.layout is torch.strided
        and right.ndim == 2
        and left.data_ptr() == right.data_ptr()
        and (left.shape, left.stride()) == (right.shape[::-1], right.stride()[::-1])
    )


def _pays(x: Tensor) -> bool:
    """Whether blocks are faster; on a GPU, and of 16-bit types, that is not known."""
    wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    return x.is_cpu and wide and x.shape[1] > _WIDTH


def _square(x: Tensor) -> Tensor:
    """x^T x, (H, H) of (T, H)."""
    result = x.new_empty(x.shape[1], x.shape[1])
    for start in range(0, x.shape[1], _WIDTH):
        own, rest = slice(start, start + _WIDTH), slice(start + _WIDTH, None)
        torch.mm(x[:, own].T, x[:, start:], out=result[own, start:])
        result[rest, own] = result[own, rest].T
    return result

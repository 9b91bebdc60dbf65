"""torch.optim.swa_utils: steps of averages of ViT-B/32's size."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import dropins
from ..shapes import TOY, VIT_B_32, Shape
from . import Case

_SEAM = "torch.optim.swa_utils:"


def tensors(shape: Shape, dtype: torch.dtype, seed: int) -> list[Tensor]:
    """Of a model of that shape, the same ones for a seed."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=g).to(dtype) for _, size in shape.tensors()]


def model(shape: Shape, seed: int) -> nn.Module:
    """A module with parameters of that shape and no forward."""
    return nn.ParameterList(tensors(shape, torch.float32, seed))


def move(name: str, shape: Shape, dtype: torch.dtype) -> Callable[[], Any]:
    """A step of the average that a function of ``swa_utils`` makes."""
    from torch.optim import swa_utils

    function = getattr(swa_utils, name)()
    averages, end = tensors(shape, dtype, 0), tensors(shape, dtype, 1)

    def call() -> list[Tensor]:
        function(averages, end, torch.tensor(1))
        return averages

    return call


def update(shape: Shape) -> Callable[[], Any]:
    """A step of an ``AveragedModel`` that is not the first."""
    from torch.optim import swa_utils

    function = swa_utils.get_ema_multi_avg_fn(0.999)
    average = swa_utils.AveragedModel(model(shape, 0), multi_avg_fn=function)
    average.update_parameters(model(shape, 0))
    other = model(shape, 1)

    def call() -> list[Tensor]:
        average.update_parameters(other)
        return list(average.parameters())

    return call


def cases() -> Iterator[Case]:
    for shape, size in ((TOY, dropins.TOY), (VIT_B_32, VIT_B_32.name)):
        for dtype in (torch.float32, torch.bfloat16):
            for name in ("get_ema_multi_avg_fn", "get_swa_multi_avg_fn"):
                make = functools.partial(move, name, shape, dtype)
                yield Case(_SEAM + name, size, "torch_swa", make, in_place=True)
        make = functools.partial(update, shape)
        where = f"{_SEAM}AveragedModel.update_parameters"
        yield Case(where, size, "torch_swa", make, in_place=True)


CASES = tuple(cases())

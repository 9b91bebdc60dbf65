"""peft: merges of three adapters' tensors, and a layer's ``svd``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import dropins
from . import Case

_MERGING = "peft.utils.merge_utils:"
_MODEL = "peft.tuners.lora.model:LoraModel."
_SVD = "_svd_generalized_task_arithmetic_weighted_adapter"
_SIZES = {dropins.TOY: (16, 64), "LoRA 16 x 4096": (16, 4096), "matrix 1024 x 4096": (1024, 4096)}
_WEIGHTS = [0.5, 0.3, 0.2]


def merge(name: str, shape: tuple[int, int], *options: Any) -> Callable[[], Tensor]:
    """A call of a function of ``merge_utils``, looked up in each."""
    from peft.utils import merge_utils

    g = torch.Generator().manual_seed(0)
    # No two of one magnitude: of those that are tied, torch has its own choice.
    order = [torch.randperm(shape[0] * shape[1], generator=g) for _ in _WEIGHTS]
    tensors = [((o - o.numel() // 2 + 0.25) / 2**20).view(shape) for o in order]
    weights = torch.tensor(_WEIGHTS)
    return lambda: getattr(merge_utils, name)(tensors, weights, *options)


def svd(width: int) -> Callable[[], list[Tensor]]:
    """A weighted adapter of a model of one layer; each call makes another one."""
    import peft

    torch.manual_seed(0)
    names = ["a0", "a1", "a2"]
    config = peft.LoraConfig(r=min(16, width // 4), target_modules=["0"], init_lora_weights=False)
    layers = torch.nn.Sequential(torch.nn.Linear(width, width))
    model = peft.get_peft_model(layers, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)

    def call() -> list[Tensor]:
        model.add_weighted_adapter(names, _WEIGHTS, "all", combination_type="svd")
        layer = model.base_model.model[0]
        product = layer.get_delta_weight("all").detach().clone()
        model.delete_adapter("all")
        return [product]

    return call


def share(result: Any, expected: list[Tensor]) -> None:
    """AssertionError unless DARE kept about as much, on about the same scale."""
    for statistic in (lambda x: (x != 0).double().mean(), lambda x: x.abs().double().mean()):
        got, wanted = float(statistic(result)), float(statistic(expected[0]))
        if abs(got - wanted) > 0.2 * wanted:
            raise AssertionError(f"{got:.4g} where the host has {wanted:.4g}")


def close(result: Any, expected: list[Tensor]) -> None:
    """AssertionError unless products of the factors agree to rounding."""
    torch.testing.assert_close(result[0], expected[0], rtol=1e-3, atol=1e-3)


def cases() -> Iterator[Case]:
    for size, shape in _SIZES.items():
        for name, options in (("ties", (0.5,)), ("magnitude_prune", (0.5,))):
            make = functools.partial(merge, name, shape, *options)
            yield Case(_MERGING + name, size, "peft", make, terms=3)
        for name in ("dare_linear", "dare_ties"):
            make = functools.partial(merge, name, shape, 0.5)
            yield Case(_MERGING + name, size, "peft", make, share)
    make = functools.partial(merge, "task_arithmetic", _SIZES["matrix 1024 x 4096"])
    yield Case(f"{_MERGING}task_arithmetic", "matrix 1024 x 4096", "peft", make, terms=3)
    for size, width in ((dropins.TOY, 32), ("layer 1024 x 1024", 1024)):
        yield Case(_MODEL + _SVD, size, "peft", functools.partial(svd, width), close)


CASES = tuple(cases())

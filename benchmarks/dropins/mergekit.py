"""mergekit: every method that is replaced, on one tensor of a base and its experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import dropins
from . import Case

_METHODS = "mergekit.merge_methods"
_ARITHMETIC = f"{_METHODS}.generalized_task_arithmetic:GeneralizedTaskArithmeticMerge.merge_group"
_WEIGHTS = [0.5, 0.3, 0.2]
_SIZES = {dropins.TOY: (16, 64), "matrix 4096 x 4096": (4096, 4096)}
# Seam, parameters, experts.
_CALLS: dict[str, tuple[str, dict[str, Any], int]] = {
    "task_arithmetic": (_ARITHMETIC, {"weight": _WEIGHTS}, 3),
    "ties": (_ARITHMETIC, {"weight": _WEIGHTS, "density": 0.2}, 3),
    "dare_ties": (_ARITHMETIC, {"weight": _WEIGHTS, "density": 0.2}, 3),
    "breadcrumbs": (_ARITHMETIC, {"weight": _WEIGHTS, "density": 0.9}, 3),
    "linear": (f"{_METHODS}.linear:linear_merge.implementation", {"weight": [1.0, *_WEIGHTS]}, 3),
    "slerp": (f"{_METHODS}.slerp:slerp", {"t": 0.3}, 1),
    "nuslerp": (
        f"{_METHODS}.nuslerp:nuslerp_merge_method.implementation", {"weight": [0.3, 0.7]}, 2,
    ),
    "multislerp": (
        f"{_METHODS}.multislerp:multislerp.implementation", {"weight": _WEIGHTS}, 3,
    ),
    "karcher": (f"{_METHODS}.karcher:karcher_merge_tensors", {}, 3),
    "model_stock": (f"{_METHODS}.model_stock:model_stock_merge_method.implementation", {}, 3),
    "sce": (f"{_METHODS}.sce:sce_merge.implementation", {"select_topk": 0.5}, 3),
    "ram": (f"{_METHODS}.ram:ram_merge.implementation", {"epsilon": 1e-3}, 3),
    "nearswap": (f"{_METHODS}.nearswap:nearswap_merge.implementation", {"t": 0.3}, 1),
}  # fmt: skip


def unlike(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    """A task vector of which no two elements have one magnitude: among those mergekit's
    sort decides.

    Magnitudes are neighbours in fp32, in any order, from 1/4 on.
    """
    n = shape[0] * shape[1]
    magnitudes = (torch.randperm(n, generator=g, dtype=torch.int32) + 0x3E800000).view(
        torch.float32
    )
    return torch.where(torch.rand(n, generator=g) < 0.5, magnitudes, -magnitudes).view(shape)


def merge(
    name: str, parameters: dict[str, Any], experts: int, shape: tuple[int, int]
) -> Callable[[], Tensor]:
    """A call of a method by its name, looked up in each."""
    from mergekit import merge_methods

    g = torch.Generator().manual_seed(0)
    deltas = [unlike(shape, g) for _ in range(experts)]
    tensors = [torch.zeros(shape), *deltas]
    if experts < 3:  # models of one direction and of none are other cases
        tensors[0] = torch.randn(shape, generator=g)

    def call() -> Tensor:
        torch.manual_seed(0)
        return merge_methods.merge_tensors(tensors, name, parameters=parameters, base_index=0)

    return call


def sparsify(shape: tuple[int, int]) -> Callable[[], Tensor]:
    """A call of the trimming of one task vector, looked up in each."""
    from mergekit import sparsify as module

    tensor = unlike(shape, torch.Generator().manual_seed(0))
    kind = module.SparsificationMethod.magnitude
    return lambda: module.sparsify(tensor, density=0.2, method=kind)


def share(result: Tensor, expected: list[Tensor]) -> None:
    """AssertionError unless DARE kept about as much, on about the same scale."""
    for statistic in (lambda x: (x != 0).double().mean(), lambda x: x.abs().double().mean()):
        got, wanted = float(statistic(result)), float(statistic(expected[0]))
        if abs(got - wanted) > 0.2 * wanted:
            raise AssertionError(f"{got:.4g} where the host has {wanted:.4g}")


def close(result: Tensor, expected: list[Tensor]) -> None:
    """AssertionError unless both agree as far as mergekit's own sums in fp32 are right, which over
    millions of elements lose digits; tests compare what is smaller."""
    scale = float(expected[0].abs().max())
    torch.testing.assert_close(result, expected[0], rtol=0, atol=1e-2 * scale)


def nearly(result: Tensor, expected: list[Tensor]) -> None:
    """AssertionError unless both agree but where variances in fp32 lie on either side of a cut."""
    apart = int(((result - expected[0]).abs() > 1e-5).sum())
    if apart > max(2, result.numel() // 1_000_000):
        raise AssertionError(f"{apart} elements are not the host's")


_CHECKS = {
    "sce": nearly,
    "dare_ties": share,
    **dict.fromkeys(("slerp", "nuslerp", "multislerp", "karcher", "model_stock"), close),
}


def cases() -> Iterator[Case]:
    for size, shape in _SIZES.items():
        for name, (seam, parameters, experts) in _CALLS.items():
            make = functools.partial(merge, name, parameters, experts, shape)
            label = size if size == dropins.TOY else f"{name}, {size}"
            case = Case(seam, label, "mergekit", make, _CHECKS.get(name), terms=3)
            # DARE's masks are torch's draws: where they have to be, the call stays mergekit's.
            yield case._replace(parities=("accurate",)) if name == "dare_ties" else case
        make = functools.partial(sparsify, shape)
        yield Case("mergekit.sparsify:sparsify", size, "mergekit", make)


CASES = [*cases()]

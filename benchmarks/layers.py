"""Layers of ViT experts: their sizes, their tensors in an arena, and how results are checked."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neulig_fast import testing
from neulig_fast._registry import Op

EXPERTS = 5


@dataclasses.dataclass(frozen=True)
class Layer:
    """B images of T tokens, through N experts; a linear layer of ``ins`` values to ``outs``."""

    name: str
    B: int
    T: int
    ins: int
    outs: int
    activation: str | None = None
    N: int = EXPERTS

    @property
    def shape(self) -> str:
        return f"{self.name} B{self.B} T{self.T}"


def layers(quick: bool, device: str) -> Iterator[Layer]:
    """Linear layers of ViT-B/32 and ViT-L/14, and one row per image, as a projection has."""
    if quick:
        yield Layer("toy", 2, 4, 16, 12, "gelu", N=3)
        return
    B = 8 if device == "cpu" else 64
    yield Layer("ViT-B-32 qkv", B, 50, 768, 2304)
    yield Layer("ViT-B-32 mlp in", B, 50, 768, 3072, "gelu")
    yield Layer("ViT-B-32 mlp out", B, 50, 3072, 768)
    yield Layer("ViT-B-32 projection", B, 1, 768, 512)
    yield Layer("ViT-L-14 mlp in", B // 4, 257, 1024, 4096, "gelu")


def norms(quick: bool, device: str) -> Iterator[Layer]:
    """Layer norms of the same models; ``ins`` is their width."""
    if quick:
        yield Layer("toy", 2, 4, 16, 16, N=3)
        return
    B = 8 if device == "cpu" else 64
    yield Layer("ViT-B-32 norm", B, 50, 768, 768)
    yield Layer("ViT-L-14 norm", B, 257, 1024, 1024)


def draw(*shape: int, seed: int, dtype: torch.dtype, device: str) -> Tensor:
    """Standard normal values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def views(N: int, *shapes: tuple[int, ...], dtype: torch.dtype, device: str) -> Iterator[Tensor]:
    """Stacked parameters (N, *shape) as views of one arena, each on a 128-byte boundary."""
    unit = 128 // dtype.itemsize
    lengths = [torch.Size(shape).numel() for shape in shapes]
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + -(-length // unit) * unit)
    arena = draw(N, starts[-1], seed=3, dtype=dtype, device=device)
    for start, length, shape in zip(starts, lengths, shapes, strict=False):
        yield arena[:, start : start + length].view(N, *shape)


def check(op: Op, args: tuple[Any, ...]) -> Callable[[Any], None]:
    """The tolerance rule for every result; what it is compared with is computed once."""

    @functools.cache
    def expected() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        exact = testing.cast(args, torch.float64)
        return testing.outputs(op.reference(*args)), testing.outputs(op.reference(*exact))

    def compare(result: Any) -> None:
        for got, working, oracle in zip(testing.outputs(result), *expected(), strict=True):
            testing.assert_within_rule(got, working, oracle, op.terms(*args))

    return compare


def size(*tensors: Tensor | None) -> int:
    """Bytes of their values, each once, wherever they lie."""
    return sum(t.numel() * t.itemsize for t in tensors if t is not None)

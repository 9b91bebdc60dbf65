"""cross_moments: sums behind the correlations of two networks' units, a batch of activations.

Rows are the tokens or positions of a batch; units those of a residual stream, of an MLP's hidden
layer, or channels of a convolution, whose positions lie side by side. The shifts are the means of
some rows. Least traffic: both matrices once, and the products. The others: shifted copies and their
product, eager and by torch.compile; the product of what is not shifted, centred afterwards, which
in fp32 costs digits. The ceiling is the product alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from neulig_fast.ops.cross_moments import OP

from . import harness, machine, selection
from .harness import Case, Provider
from .layers import check, draw, size


@dataclasses.dataclass(frozen=True)
class Setting:
    """B samples of T rows of as many units of either network."""

    name: str
    B: int
    T: int
    units: int
    maps: bool = False  # rows of a sample are one stride apart, units T of them

    @property
    def shape(self) -> str:
        return f"{self.name} B{self.B} T{self.T}"

    def activations(self, seed: int, dtype: torch.dtype, device: str) -> Tensor:
        """(B, T, units) of means up to a few times their spread."""
        values = draw(self.B, self.T, self.units, seed=seed, dtype=torch.float32, device=device)
        values += 2 * draw(self.units, seed=seed + 1, dtype=torch.float32, device=device)
        values = values.to(dtype)
        return values.mT.contiguous().mT if self.maps else values


def settings(quick: bool) -> Iterator[Setting]:
    if quick:
        yield Setting("toy", 2, 9, 12)
        yield Setting("toy maps", 2, 9, 12, maps=True)
        return
    yield Setting("768 units", 1, 8192, 768)
    yield Setting("3072 units", 1, 8192, 3072)
    yield Setting("256 channels", 42, 196, 256, maps=True)


# -- other people's ways --------------------------------------------------------------------------


def copies(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    x, y = x.float().flatten(0, 1) - a, y.float().flatten(0, 1) - b
    return x.T @ y, x.sum(0), x.square().sum(0), y.sum(0), y.square().sum(0)


def centred_last(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    x, y = x.float().flatten(0, 1), y.float().flatten(0, 1)
    T, sx, sy = len(x), x.sum(0), y.sum(0)
    cross = x.T @ y - torch.outer(sx, b) - torch.outer(a, sy) + T * torch.outer(a, b)
    squares = (z.square().sum(0) - 2 * s * c + T * c * c for z, s, c in ((x, sx, a), (y, sy, b)))
    x_square, y_square = squares
    return cross, sx - T * a, x_square, sy - T * b, y_square


# -- the case -------------------------------------------------------------------------------------


def make_case(setting: Setting, dtype: torch.dtype, device: str) -> Case:
    x, y = (setting.activations(seed, dtype, device) for seed in (6, 8))
    a, b = (z[:1].float().flatten(0, 1)[:256].mean(0) for z in (x, y))
    args = x, y, a, b
    rows, units = setting.B * setting.T, setting.units
    result, flops, wide = 4 * units * units, 2 * rows * units * units, 8 * rows * units
    compiled = harness.compiled(copies)
    flat = [z.flatten(0, 1) for z in (x, y)]
    return Case(
        op="cross_moments",
        mode="fwd",
        shape=setting.shape,
        dtype=dtype,
        device=device,
        threads=machine.cores(),
        providers=[
            *harness.ours(OP, device, lambda: OP(*args), args, 2 * wide, needs=result),
            Provider("shifted copies", lambda: copies(*args), needs=2 * wide + result),
            Provider("centred last", lambda: centred_last(*args), needs=2 * wide + 3 * result),
            Provider("torch.compile", lambda: compiled(*args), needs=2 * wide + result),
            Provider(
                "ceiling/product alone", lambda: flat[0].T @ flat[1], "ceiling",
                traffic=size(x, y) + result, flops=flops, needs=result,
            ),
        ],
        check=check(OP, args),
        traffic=size(x, y) + result,
        flops=flops,
        resident=2 * size(x, y),
        numbers={"P": units},
    )  # fmt: skip


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for setting in settings(quick):
            if selection.wanted(setting.shape, dtype):
                yield make_case(setting, dtype, device)


if __name__ == "__main__":
    harness.main("cross_moments", cases)

"""expert_linear: one layer of five ViT experts on the same batch of images.

Least traffic: every expert's weights and the inputs once, the results once. The others: a loop over
the experts, vmap over them, one batched product, each followed by the activation, and
torch.compile of the loop and of our reference, which adds in fp32 whatever the type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from neulig_fast.ops._activation import ACTIVATIONS
from neulig_fast.ops.expert_linear import OP, expert_linear_reference

from . import harness, machine, selection
from .harness import Case, Provider
from .layers import Layer, check, draw, layers, size, views

# -- other people's ways --------------------------------------------------------------------------


def loop(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    f = ACTIVATIONS[activation].function
    return torch.stack([f(F.linear(x, W, b)) for W, b in zip(weight, bias, strict=True)])


def vmap(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    y = torch.vmap(F.linear, in_dims=(None, 0, 0))(x, weight, bias)
    return ACTIVATIONS[activation].function(y)


def batched(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None) -> Tensor:
    y = torch.baddbmm(bias[:, None], x.expand(len(weight), -1, -1), weight.mT)
    return ACTIVATIONS[activation].function(y)


# -- the case -------------------------------------------------------------------------------------


def make_case(layer: Layer, dtype: torch.dtype, device: str) -> Case:
    N, R, ins, outs = layer.N, layer.B * layer.T, layer.ins, layer.outs
    x = draw(R, ins, seed=4, dtype=dtype, device=device)
    weight, bias = views(N, (outs, ins), (outs,), dtype=dtype, device=device)
    args = x, weight * ins**-0.5, bias, layer.activation
    result = N * R * outs * dtype.itemsize
    wide = 2 * result + 2 * size(x, weight) * 4 // dtype.itemsize  # the reference's copies

    def other(name: str, run: Callable[..., Tensor]) -> Provider:
        return Provider(name, lambda: run(*args), needs=3 * result)

    return Case(
        op="expert_linear",
        mode="fwd",
        shape=layer.shape,
        dtype=dtype,
        device=device,
        threads=machine.cores(),
        providers=[
            *harness.ours(OP, device, lambda: OP(*args), args, reference_needs=wide, needs=result),
            other("loop over experts", loop),
            other("vmap", vmap),
            other("baddbmm", batched),
            other("torch.compile", harness.compiled(expert_linear_reference)),
            other("torch.compile, loop", harness.compiled(loop)),
        ],
        check=check(OP, args),
        traffic=size(*args[:3]) + result,
        flops=2 * N * R * ins * outs,
        resident=2 * size(*args[:3]),
        numbers={"N": N, "P": outs * (ins + 1)},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for layer in layers(quick, device):
            if selection.wanted(layer.shape, dtype, N=layer.N):
                yield make_case(layer, dtype, device)


if __name__ == "__main__":
    harness.main("expert_linear", cases)

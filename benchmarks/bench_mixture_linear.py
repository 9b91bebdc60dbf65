"""mixture_linear: one layer of a merged model per sample, at the sizes of CLIP image towers.

The others: the merged weights of every sample blended in one pass, then a batched product; the
same sample by sample; one product over the concatenated inner dimension, with x scaled into memory
and the weights laid out for it beforehand; the products of all experts, added up; the reference
under torch.compile. The ceiling is the layer of one model for the whole batch: no mixing at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import neulig_fast
from neulig_fast.ops._activation import ACTIVATIONS
from neulig_fast.ops.mixture_linear import OP, mixture_linear_reference

from . import harness, machine, selection
from .harness import Case, Provider
from .layers import Layer, check, draw, layers, size, views

# -- other people's ways, before the activation --------------------------------------------------


def blend_then_bmm(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    merged = neulig_fast.blend(w, weight.flatten(1)).view(-1, *weight.shape[1:])
    return torch.baddbmm((w @ bias)[:, None], x, merged.mT)


def sample_by_sample(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    merged = (neulig_fast.blend(row, weight.flatten(1)).view(weight.shape[1:]) for row in w)
    return torch.stack([F.linear(x[b], W, w[b] @ bias) for b, W in enumerate(merged)])


def all_experts(x: Tensor, weight: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    parts = zip(w.T, weight, bias, strict=True)
    return sum(row[:, None, None] * F.linear(x, W, b) for row, W, b in parts)


def concatenated(x: Tensor, across: Tensor, bias: Tensor, w: Tensor) -> Tensor:
    """``across`` (O, N * I) holds the experts' weights side by side."""
    scaled = (w[:, None, :, None] * x[:, :, None]).flatten(2)
    return scaled @ across.T + (w @ bias)[:, None]


# -- the case -------------------------------------------------------------------------------------


def make_case(layer: Layer, dtype: torch.dtype, device: str) -> Case:
    B, T, N, ins, outs = layer.B, layer.T, layer.N, layer.ins, layer.outs
    x = draw(B, T, ins, seed=4, dtype=dtype, device=device)
    coef = torch.softmax(draw(B, N, seed=5, dtype=torch.float32, device=device), 1)
    weight, bias = views(N, (outs, ins), (outs,), dtype=dtype, device=device)
    across, w = weight.transpose(0, 1).flatten(1), coef.to(dtype)
    args = x, weight, bias, coef, layer.activation
    f = ACTIVATIONS[layer.activation].function
    result, flops = B * T * outs * dtype.itemsize, 2 * B * T * ins * outs
    wide = 4 * result + 2 * size(x, weight) * 4 // dtype.itemsize  # the reference's copies

    def other(name: str, run: Callable[..., Tensor], laid_out: Tensor, needs: int = 0) -> Provider:
        return Provider(name, lambda: f(run(x, laid_out, bias, w)), needs=3 * result + needs)

    compiled = harness.compiled(mixture_linear_reference)
    return Case(
        op="mixture_linear",
        mode="fwd",
        shape=layer.shape,
        dtype=dtype,
        device=device,
        threads=machine.cores(),
        providers=[
            *harness.ours(OP, device, lambda: OP(*args), args, reference_needs=wide, needs=result),
            other("blend, then bmm", blend_then_bmm, weight, B * size(weight[0])),
            other("blend, then linear, per sample", sample_by_sample, weight, size(weight[0])),
            other("experts' results, added up", all_experts, weight),
            other("concatenated, x scaled", concatenated, across, N * size(x)),
            Provider("torch.compile", lambda: compiled(*args), needs=wide),
            Provider(
                "ceiling/one model", lambda: f(F.linear(x, weight[0], bias[0])), "ceiling",
                traffic=size(x, weight[0]) + result, flops=flops,
            ),
        ],
        check=check(OP, args),
        traffic=size(x, weight, bias) + result,
        flops=flops,
        resident=2 * size(x, weight) + size(across),
        numbers={"N": N, "P": outs * (ins + 1)},
    )  # fmt: skip


def grid(quick: bool, device: str) -> Iterator[Layer]:
    """Every layer at N = 5; one of them at other numbers of experts and batches."""
    for layer in layers(quick, device):
        yield layer
        if layer.name == "ViT-B-32 mlp in":
            yield from (dataclasses.replace(layer, N=N) for N in (2, 8))
            yield from (dataclasses.replace(layer, B=B) for B in (1, 32))
            yield from (dataclasses.replace(layer, T=T) for T in (1, 2, 4, 8))


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for layer in grid(quick, device):
            if selection.wanted(layer.shape, dtype, N=layer.N):
                yield make_case(layer, dtype, device)


if __name__ == "__main__":
    harness.main("mixture_linear", cases)

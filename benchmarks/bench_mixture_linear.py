"""mixture_linear: one layer of a merged model per sample, at the sizes of CLIP image towers.

The others: the merged weights of every sample blended in one pass, then a batched product; the
same sample by sample; one product over the concatenated inner dimension, with x scaled into memory
and the weights laid out for it beforehand; the products of all experts, added up; the reference
under torch.compile. The ceiling is the layer of one model for the whole batch: no mixing at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.mixture_linear import OP, mixture_linear_reference

from . import harness, machine
from .harness import Case, Provider

# (B, T, I, O) of layers of ViT-B/32 and ViT-L/14, and of a projection after pooling
LAYERS = {
    "ViT-B-32 c_fc": (768, 3072, 50),
    "ViT-B-32 c_proj": (3072, 768, 50),
    "ViT-B-32 proj": (768, 512, 1),
    "ViT-L-14 c_fc": (1024, 4096, 257),
}
GRID = {  # (B, N)
    "cpu": [(1, 5), (8, 2), (8, 5), (8, 8), (32, 5)],
    "cuda": [(1, 5), (8, 2), (8, 5), (8, 8), (32, 5), (128, 5)],
}
TOY = {"toy": (24, 40, 7), "toy, one row": (24, 40, 1)}


def blend_then_bmm(x: Tensor, weight: Tensor, bias: Tensor, coef: Tensor) -> Tensor:
    W = neulig_fast.blend(coef, weight.flatten(1)).view(-1, *weight.shape[1:])
    return torch.baddbmm((coef @ bias)[:, None], x, W.mT)


def sample_by_sample(x: Tensor, weight: Tensor, bias: Tensor, coef: Tensor) -> Tensor:
    flat = weight.flatten(1)
    rows = [
        F.linear(x[b], neulig_fast.blend(w, flat).view(weight.shape[1:]), w @ bias)
        for b, w in enumerate(coef)
    ]
    return torch.stack(rows)


def all_experts(x: Tensor, weight: Tensor, bias: Tensor, coef: Tensor) -> Tensor:
    y = torch.zeros(*x.shape[:2], weight.shape[1], dtype=x.dtype, device=x.device)
    for i, w in enumerate(coef.unbind(1)):
        y += w[:, None, None] * F.linear(x, weight[i], bias[i])
    return y


def concatenated(x: Tensor, across: Tensor, bias: Tensor, coef: Tensor) -> Tensor:
    """``across`` (O, N * I) holds the experts' weights side by side."""
    scaled = (coef[:, None, :, None] * x[:, :, None]).flatten(2)
    return scaled @ across.T + (coef @ bias)[:, None]


def make_case(
    name: str, sizes: tuple[int, int, int], B: int, N: int, dtype: torch.dtype, device: str
) -> Case:
    width, outputs, T = sizes
    g = torch.Generator().manual_seed(12)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(device, dtype)

    x, bias, coef = draw(B, T, width), draw(N, outputs), torch.softmax(draw(B, N).float(), 1)
    arena = draw(N, outputs * width + 96)  # rows with something before and behind the layer
    weight = arena[:, 64:-32].view(N, outputs, width)
    across, w = weight.permute(1, 0, 2).flatten(1), coef.to(dtype)
    args, others = (x, weight, bias, coef, None), (x, weight, bias, w)
    compiled = harness.compiled(mixture_linear_reference)
    merged = B * outputs * width * dtype.itemsize
    return Case(
        op="mixture_linear",
        mode="fwd",
        shape=f"{name} B{B} T{T}",
        dtype=dtype,
        device=device,
        threads=machine.cores(),
        providers=[
            *harness.ours(OP, device, lambda: OP.overload(*args), args),
            Provider("blend, then bmm", lambda: blend_then_bmm(*others), needs=merged),
            Provider("blend, then linear, per sample", lambda: sample_by_sample(*others)),
            Provider("experts' products, added", lambda: all_experts(*others)),
            Provider("concatenated, x scaled", lambda: concatenated(x, across, bias, w)),
            Provider("torch.compile", lambda: compiled(*args)),
            Provider("ceiling/one model", lambda: F.linear(x, weight[0], bias[0]), "ceiling",
                     flops=2 * B * T * outputs * width),
        ],
        check=lambda result: testing.assert_op_close(OP, result, args),
        traffic=weight.nbytes + x.nbytes + B * T * outputs * dtype.itemsize,
        flops=2 * B * T * outputs * width,
        numbers={"N": N},
    )  # fmt: skip


def cases(device: str, quick: bool) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    if quick:
        for name, sizes in TOY.items():
            yield make_case(name, sizes, 3, 2, torch.float32, device)
        return
    for dtype in dtypes if device == "cpu" else (torch.bfloat16, torch.float16):
        for name, sizes in LAYERS.items():
            for B, N in GRID[device]:
                yield make_case(name, sizes, B, N, dtype, device)


if __name__ == "__main__":
    harness.main("mixture_linear", cases)

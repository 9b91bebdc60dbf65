"""mixture_layer_norm: residual and layer norm of a merged ViT per image.

Least traffic: x and the residual read once, sum and result written once. The others: a loop over
the images, each with blended gain and shift; vmap over them; one layer norm without gain for all,
then the gains of a product; torch.compile of that and of our reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from neulig_fast.ops.mixture_layer_norm import OP, mixture_layer_norm_reference

from . import harness, machine, selection
from .ceilings import ceilings
from .harness import Case, Provider
from .layers import Layer, check, draw, norms, size, views

Pair = tuple[Tensor, Tensor]

# -- other people's ways --------------------------------------------------------------------------


def loop(
    x: Tensor, weight: Tensor, bias: Tensor, coef: Tensor, eps: float, residual: Tensor
) -> Pair:
    s = x + residual
    models = zip(s, coef, strict=True)
    y = [F.layer_norm(a, a.shape[-1:], w @ weight, w @ bias, eps) for a, w in models]
    return torch.stack(y), s


def vmap(
    x: Tensor, weight: Tensor, bias: Tensor, coef: Tensor, eps: float, residual: Tensor
) -> Pair:
    def one(a: Tensor, w: Tensor) -> Tensor:
        return F.layer_norm(a, a.shape[-1:], w @ weight, w @ bias, eps)

    s = x + residual
    return torch.vmap(one)(s, coef), s


def gains_after(
    x: Tensor, weight: Tensor, bias: Tensor, coef: Tensor, eps: float, residual: Tensor
) -> Pair:
    s = x + residual
    normal = F.layer_norm(s, s.shape[-1:], eps=eps)
    return normal * (coef @ weight)[:, None] + (coef @ bias)[:, None], s


# -- the case -------------------------------------------------------------------------------------


def make_case(layer: Layer, dtype: torch.dtype, device: str) -> Case:
    shape = layer.B, layer.T, layer.ins
    both = draw(2, *shape, seed=6, dtype=dtype, device=device)
    weight, bias = views(layer.N, (layer.ins,), (layer.ins,), dtype=dtype, device=device)
    coef = draw(layer.B, layer.N, seed=7, dtype=dtype, device=device).softmax(1)
    args = both[0], weight, bias, coef, 1e-5, both[1]
    needs = size(both)
    wide = 3 * needs * 4 // dtype.itemsize

    def other(name: str, run: Callable[..., Pair]) -> Provider:
        return Provider(name, lambda: run(*args), needs=3 * needs)

    return Case(
        op="mixture_layer_norm",
        mode="fwd",
        shape=layer.shape,
        dtype=dtype,
        device=device,
        threads=machine.cores(),
        providers=[
            *harness.ours(OP, device, lambda: OP(*args), args, reference_needs=wide, needs=needs),
            other("loop over images", loop),
            other("vmap", vmap),
            other("F.layer_norm, then gains", gains_after),
            other("torch.compile", harness.compiled(mixture_layer_norm_reference)),
            other("torch.compile, gains", harness.compiled(gains_after)),
            *ceilings(both.view(2, -1), machine.cores(), write=True),
        ],
        check=check(OP, args),
        traffic=2 * size(both) + size(weight, bias, coef),
        flops=8 * both[0].numel() + 4 * coef.numel() * layer.ins,
        resident=size(both, weight, bias, coef),
        numbers={"N": layer.N, "P": 2 * layer.ins},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for layer in norms(quick, device):
            if selection.wanted(layer.shape, dtype, N=layer.N):
                yield make_case(layer, dtype, device)


if __name__ == "__main__":
    harness.main("mixture_layer_norm", cases)

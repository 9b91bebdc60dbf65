"""expert_layer_norm: residual and layer norm of five ViT experts at once.

Least traffic: x and the residual read once, sum and result written once. The others: a loop over
the experts; vmap over them; one layer norm without gain for all, then gain and shift; torch.compile
of our reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from neulig_fast.ops.expert_layer_norm import OP, expert_layer_norm_reference

from . import harness, machine, selection
from .ceilings import ceilings
from .harness import Case, Provider
from .layers import Layer, check, draw, norms, size, views

Pair = tuple[Tensor, Tensor]

# -- other people's ways --------------------------------------------------------------------------


def loop(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor) -> Pair:
    s = x + residual
    rows = zip(s, weight, bias, strict=True)
    return torch.stack([F.layer_norm(a, w.shape, w, b, eps) for a, w, b in rows]), s


def vmap(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor) -> Pair:
    s = x + residual
    return torch.vmap(lambda a, w, b: F.layer_norm(a, w.shape, w, b, eps))(s, weight, bias), s


def gains_after(x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor) -> Pair:
    s = x + residual
    return F.layer_norm(s, s.shape[-1:], eps=eps) * weight[:, None] + bias[:, None], s


# -- the case -------------------------------------------------------------------------------------


def make_case(layer: Layer, dtype: torch.dtype, device: str) -> Case:
    shape = layer.N, layer.B * layer.T, layer.ins
    both = draw(2, *shape, seed=5, dtype=dtype, device=device)
    weight, bias = views(layer.N, (layer.ins,), (layer.ins,), dtype=dtype, device=device)
    args = both[0], weight, bias, 1e-5, both[1]
    needs = size(both)
    wide = 3 * needs * 4 // dtype.itemsize

    def other(name: str, run: Callable[..., Pair]) -> Provider:
        return Provider(name, lambda: run(*args), needs=3 * needs)

    return Case(
        op="expert_layer_norm",
        mode="fwd",
        shape=layer.shape,
        dtype=dtype,
        device=device,
        threads=machine.cores(),
        providers=[
            *harness.ours(OP, device, lambda: OP(*args), args, reference_needs=wide, needs=needs),
            other("loop over experts", loop),
            other("vmap", vmap),
            other("F.layer_norm, then gains", gains_after),
            other("torch.compile", harness.compiled(expert_layer_norm_reference)),
            *ceilings(both.view(2, -1), machine.cores(), write=True),
        ],
        check=check(OP, args),
        traffic=2 * size(both) + size(weight, bias),
        flops=8 * both[0].numel(),
        resident=size(both, weight, bias),
        numbers={"N": layer.N, "P": 2 * layer.ins},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for layer in norms(quick, device):
            if selection.wanted(layer.shape, dtype, N=layer.N):
                yield make_case(layer, dtype, device)


if __name__ == "__main__":
    harness.main("expert_layer_norm", cases)

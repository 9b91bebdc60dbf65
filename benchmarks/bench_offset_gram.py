"""offset_gram: sums and Gram matrix of the experts' offsets, ViT-B/32-sized.

Least traffic: N experts read once. The others: offsets of the flat arena times their transpose,
eager and by torch.compile (of the formula: our reference is a loop over 2300 blocks, which no
compiler unrolls), and per tensor in the working precision and in double. In fp32 a flat product
over 1.5e8 columns loses most of its digits; the check reports it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.offset_gram import OP, offset_gram_reference

from . import harness, machine, selection
from .ceilings import ceilings
from .harness import Case, Provider
from .shapes import TOY, VIT_B_32, Experts, Shape, layout, make_experts

Pair = tuple[Tensor, Tensor]
_BLOCK = 1 << 20  # columns of the fp64 oracle at a time


def flat(params: Tensor) -> Pair:
    offsets = params - params.mean(0)
    return offsets.sum(1)[None], (offsets @ offsets.T)[None]


def per_tensor(tensors: list[Tensor], dtype: torch.dtype) -> Pair:
    sums, gram = 0, 0
    for stacked in tensors:
        offsets = stacked.flatten(1).to(dtype)
        offsets = offsets - offsets.mean(0)
        sums, gram = sums + offsets.sum(1), gram + offsets @ offsets.T
    return sums[None], gram[None]


def check(experts: Experts) -> Callable[[Pair], None]:
    params = experts.params

    @functools.cache
    def expected(dtype: torch.dtype) -> Pair:
        if dtype == params.dtype:
            return offset_gram_reference(params)
        parts = [offset_gram_reference(part.to(dtype)) for part in params.split(_BLOCK, 1)]
        sums, grams = zip(*parts, strict=True)
        return sum(sums), sum(grams)

    def compare(result: Pair) -> None:
        for got, working, exact in zip(
            result, expected(params.dtype), expected(torch.float64), strict=True
        ):
            testing.assert_within_rule(got.double(), working, exact, params.shape[1])

    return compare


def make_case(size: Shape, dtype: torch.dtype, N: int, device: str) -> Case:
    experts = make_experts(N, layout(size, dtype), dtype, device)
    params, threads = experts.params, machine.cores()
    compiled = harness.compiled(flat)
    stacked = [params[:, s.start : s.start + s.length] for s in experts.segments]
    return Case(
        op="offset_gram",
        mode="fwd",
        shape=size.name,
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[
            *harness.ours(OP, device, lambda: neulig_fast.offset_gram(params), (params, None)),
            Provider("flat offsets @ offsets.T", lambda: flat(params), needs=2 * params.nbytes),
            Provider("torch.compile", lambda: compiled(params), needs=2 * params.nbytes),
            Provider("per tensor", lambda: per_tensor(stacked, dtype)),
            Provider("per tensor, double", lambda: per_tensor(stacked, torch.float64)),
            *ceilings(params, threads, write=False),
        ],
        check=check(experts),
        traffic=params.nbytes,
        flops=2 * N * N * params.shape[1],
        resident=params.nbytes,
        numbers={"N": N, "P": params.shape[1], "S": 1},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    size, N = (TOY, 3) if quick else (VIT_B_32, 5)
    for dtype in (torch.float32, torch.bfloat16):
        if selection.wanted(size.name, dtype, N=N):
            yield make_case(size, dtype, N, device)


if __name__ == "__main__":
    harness.main("offset_gram", cases)

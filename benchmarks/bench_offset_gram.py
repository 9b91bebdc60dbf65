"""offset_gram: sums and Gram matrix of the experts' offsets, ViT-B/32-sized; whole and per tensor.

Least traffic: N experts read once. The others: offsets of the flat arena times their transpose,
eager and by torch.compile (of the formula: our reference is a loop over 2300 blocks, which no
compiler unrolls); the product of the parameters, centred afterwards; dot products of flattened
offsets, pair by pair; and per tensor a product or an einsum, in the working precision and in
double. In fp32 a flat product over 1.5e8 columns loses most of its digits; the check reports it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.offset_gram import OP, offset_gram_reference

from . import harness
from .bench_blend import Setting, grid
from .ceilings import ceilings
from .harness import Case, Provider
from .shapes import TOY, Experts, make_experts

Pair = tuple[Tensor, Tensor]
_BLOCK = 1 << 20  # columns of the oracle at a time
_EPS = torch.finfo(torch.float32).eps  # of the products; they are added in fp64


def settings(quick: bool, device: str) -> Iterator[Setting]:
    for dtype in (torch.float32, torch.bfloat16):
        if quick:
            yield Setting(TOY, dtype, 3)
            yield Setting(TOY, dtype, 5, per_tensor=True)
        else:
            yield from grid(dtype, device)


# -- other people's ways --------------------------------------------------------------------------


def flat(params: Tensor) -> Pair:
    offsets = params - params.mean(0)
    return offsets.sum(1)[None], (offsets @ offsets.T)[None]


def centred_last(params: Tensor) -> Pair:
    sums, gram = params.sum(1), params @ params.T
    gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    return (sums - sums.mean())[None], gram[None]


def pairs(params: Tensor) -> Pair:
    offsets = params - params.mean(0)
    products = [torch.dot(a, b) for a in offsets for b in offsets]
    return offsets.sum(1)[None], torch.stack(products).view(1, len(params), len(params))


def einsum(offsets: Tensor) -> Tensor:
    return torch.einsum("ip,jp->ij", offsets, offsets)


def matmul(offsets: Tensor) -> Tensor:
    return offsets @ offsets.T


def per_tensor(tensors: list[Tensor], dtype: torch.dtype, gram: Callable, whole: bool) -> Pair:
    """Sums (S, N) and Gram matrices (S, N, N) of every tensor, or (1, ...) of the whole model."""
    sums, grams = [], []
    for stacked in tensors:
        offsets = stacked.flatten(1).to(dtype)
        offsets = offsets - offsets.mean(0)
        sums.append(offsets.sum(1))
        grams.append(gram(offsets))
    rows = torch.stack(sums), torch.stack(grams)
    return (rows[0].sum(0, True), rows[1].sum(0, True)) if whole else rows


# -- the case -------------------------------------------------------------------------------------


def check(experts: Experts, whole: bool) -> Callable[[Pair], None]:
    params, bounds = experts.params, experts.segments.bounds.tolist()
    if whole:
        bounds = [*range(0, bounds[-1], _BLOCK), bounds[-1]]

    @functools.cache
    def expected(dtype: torch.dtype) -> Pair:
        parts = [offset_gram_reference(params[:, a:b].to(dtype)) for a, b in pairwise(bounds)]
        sums, grams = (torch.cat(rows) for rows in zip(*parts, strict=True))
        return (sums.sum(0, True), grams.sum(0, True)) if whole else (sums, grams)

    def compare(result: Pair) -> None:
        for got, working, exact in zip(
            result, expected(params.dtype), expected(torch.float64), strict=True
        ):
            testing.assert_within_rule(got.double(), working, exact, params.shape[1], _EPS)

    return compare


def others(experts: Experts, whole: bool) -> list[Provider]:
    params, dtype = experts.params, experts.params.dtype
    stacked = [params[:, s.start : s.start + s.length] for s in experts.segments]
    largest = max(tensor.numel() for tensor in stacked)

    def each(name: str, gram: Callable, working: torch.dtype) -> Provider:
        run = functools.partial(per_tensor, stacked, working, gram, whole)
        return Provider(name, run, needs=3 * largest * working.itemsize)

    found = [
        each("per tensor", matmul, dtype),
        each("per tensor, einsum", einsum, dtype),
        each("per tensor, double", matmul, torch.float64),
    ]
    if not whole:
        return found
    compiled, needs = harness.compiled(flat), 2 * params.nbytes
    return [
        *found,
        Provider("flat offsets @ offsets.T", lambda: flat(params), needs=needs),
        Provider("flat offsets, pair by pair", lambda: pairs(params), needs=needs),
        Provider("flat matmul, centred last", lambda: centred_last(params)),
        Provider("torch.compile", lambda: compiled(params), needs=needs),
    ]


def make_case(setting: Setting, device: str) -> Case:
    N, whole, segments = setting.N, not setting.per_tensor, setting.segments
    experts = make_experts(N, segments, setting.dtype, device)
    params = experts.params
    args = params, None if whole else segments.bounds_on(params.device)
    ours = harness.ours(OP, device, lambda: neulig_fast.offset_gram(*args), args)
    return Case(
        op="offset_gram",
        mode="fwd",
        shape=setting.shape.name,
        dtype=setting.dtype,
        device=device,
        threads=setting.threads,
        providers=[
            *ours,
            *others(experts, whole),
            *ceilings(params, setting.threads, write=False),
        ],
        check=check(experts, whole),
        traffic=params.nbytes,
        flops=N * N * segments.width,
        resident=setting.resident(N + 1),
        numbers={name: n for name, n in setting.numbers.items() if name != "K"},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for setting in settings(quick, device):
        if setting.wanted("offset_gram", device, setting.N + 1):
            yield make_case(setting, device)


if __name__ == "__main__":
    harness.main("offset_gram", cases)

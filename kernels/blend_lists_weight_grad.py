"""blend_lists_weight_grad on Triton: g[t, i] = <grad_t, x[i, t]>, found in tables of addresses.

Two stages in a fixed order, without atomics: partial sums per chunk and expert, then their totals
per tensor, or over all, in fp64.
"""

from __future__ import annotations

import dataclasses

import torch

from ._launch import REGISTERS, Config, Launch, config, run, tl, triton
from ._lists import TYPES, all_addresses, load_from, why_not
from ._segments import find_segment, search_steps

__all__ = ["blend_lists_weight_grad", "chunk", "why_not"]

BLOCKS = 16  # blocks of columns in a chunk: one reduction across threads for all of them
LANES = 1024  # partial sums that a program of the second stage adds at once


@triton.jit
def _sum_some(
    addresses_ptr, grad, partials, chunks, start, length, first, COUNT: tl.constexpr,
    TYPE: tl.constexpr, GRAD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The partial sums of COUNT experts from number ``first`` on, over one chunk."""
    ACC: tl.constexpr = partials.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    sums = (tl.zeros((BLOCK,), ACC),)
    for _ in tl.static_range(1, COUNT):
        sums += (tl.zeros((BLOCK,), ACC),)
    stop = tl.minimum(start + CHUNK, length)
    while start < stop:  # two blocks' loads are in flight together
        for block in tl.static_range(2):
            at = start + block * BLOCK + lanes
            mask = None
            other = None
            if UNIT == 1:
                mask = at < length
                other = 0.0
            g = load_from(grad, at, mask, other, GRAD, UNIT).to(ACC)
            added = ()
            for j in tl.static_range(COUNT):
                x = load_from(tl.load(addresses_ptr + first + j), at, mask, other, TYPE, UNIT)
                added += (sums[j] + g * x.to(ACC),)
            sums = added
        start += 2 * BLOCK
    for j in tl.static_range(COUNT):
        tl.store(partials + (first + j) * chunks, tl.sum(sums[j]))


@triton.jit
def _sum_chunk(
    addresses_ptr, grad, partials, chunks, start, length, N: tl.constexpr, TYPE: tl.constexpr,
    HELD: tl.constexpr, GRAD: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """HELD experts at a time, which share one read of the gradient, then the rest of them."""
    for first in range(0, N // HELD * HELD, HELD):
        _sum_some(addresses_ptr, grad, partials, chunks, start, length, first, HELD, TYPE, GRAD,
                  UNIT, BLOCK, CHUNK)  # fmt: skip
    if N % HELD > 0:
        _sum_some(addresses_ptr, grad, partials, chunks, start, length, N // HELD * HELD, N % HELD,
                  TYPE, GRAD, UNIT, BLOCK, CHUNK)  # fmt: skip


@triton.jit(do_not_specialize=["T", "chunks"])
def blend_lists_weight_grad_partial_kernel(
    table_ptr, grads_ptr, partials_ptr, T: tl.int64, chunks: tl.int64,
    N: tl.constexpr, HELD: tl.constexpr, STEPS: tl.constexpr, TYPE: tl.constexpr,
    GRAD: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """partials[i, c] = sum over the elements p of chunk c of grad_t[p] * x[i, t][p].

    table (see _lists.py) of contiguous tensors of TYPE, in chunks of CHUNK; grads (T,) int64:
    addresses of contiguous tensors of GRAD, or 0 for zeros; partials (N, chunks) contiguous, fp32
    (fp64 for fp64 tensors), in which a lane of BLOCK adds CHUNK / BLOCK products before a tree
    adds the lanes. Reads N + 1 values per element; for every HELD experts more the gradient again,
    from cache.
    """
    c = tl.program_id(0).to(tl.int64)
    # The interpreter gives an annotated argument the smallest type that holds it.
    tensors, width = T.to(tl.int64), chunks.to(tl.int64)
    t = find_segment(table_ptr, c, tensors, STEPS, 0)
    length = tl.load(table_ptr + tensors + 1 + t)
    addresses_ptr = table_ptr + 3 * tensors + 1 + t * N
    grad = tl.load(grads_ptr + t)
    start = (c - tl.load(table_ptr + t)) * CHUNK
    partials = partials_ptr + c
    aligned = ((all_addresses(addresses_ptr, N) | grad) & 15) == 0
    if grad == 0:
        for i in range(N):
            tl.store(partials + i * width, 0.0)
    elif (start + CHUNK <= length) & aligned:
        _sum_chunk(addresses_ptr, grad, partials, width, start, length, N, TYPE, HELD, GRAD, 16,
                   BLOCK, CHUNK)  # fmt: skip
    else:
        _sum_chunk(addresses_ptr, grad, partials, width, start, length, N, TYPE, HELD, GRAD, 1,
                   BLOCK, CHUNK)  # fmt: skip


@triton.jit(do_not_specialize=["N", "chunks"])
def blend_lists_weight_grad_total_kernel(
    partials_ptr, bounds_ptr, out_ptr, N: tl.int64, chunks: tl.int64, LANES: tl.constexpr
):
    """out[t, i] = sum of partials[i, c] over the chunks of tensor t, or of all without bounds.

    partials (N, chunks) contiguous, fp32 or fp64; bounds (T + 1,) int64 or None; out (T, N) or
    (1, N), fp64. One program per output: lane l adds chunks l, l + LANES, ..., then a tree adds
    the lanes, all in fp64. Reads N * chunks values once.
    """
    program = tl.program_id(0).to(tl.int64)
    experts, width = N.to(tl.int64), chunks.to(tl.int64)
    t, i = program // experts, program % experts
    first, end = t * 0, width
    if bounds_ptr is not None:
        first, end = tl.load(bounds_ptr + t), tl.load(bounds_ptr + t + 1)
    lanes = tl.arange(0, LANES)
    total = tl.zeros((LANES,), tl.float64)
    while first < end:
        c = first + lanes
        partial = tl.load(partials_ptr + i * width + c, mask=c < end, other=0.0)
        total += partial.to(tl.float64)
        first += LANES
    tl.store(out_ptr + program, tl.sum(total))


def chunk(dtype: torch.dtype, experts: int) -> int:
    """The elements of a chunk, for which tables are made."""
    return BLOCKS * config("blend_lists_weight_grad", dtype, experts, 1).block


def blend_lists_weight_grad(
    table: torch.Tensor,
    grads: torch.Tensor,
    experts: int,
    chunk: int,
    chunks: int,
    per_tensor: bool,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
) -> torch.Tensor:
    """The native twin's arguments, with :func:`chunk`; see neulig_fast/ops/_lists.py."""
    launch = config("blend_lists_weight_grad", dtype, experts, 1)
    launch = dataclasses.replace(launch, block=chunk // BLOCKS)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    partials = torch.empty((experts, chunks), dtype=acc, device=table.device)
    rows = grads.numel() if per_tensor else 1
    out = torch.empty((rows, experts), dtype=torch.float64, device=table.device)
    run(table, launches(table, grads, partials, out, dtype, grad_dtype, launch))
    return out


def launches(
    table: torch.Tensor,
    grads: torch.Tensor,
    partials: torch.Tensor,
    out: torch.Tensor,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    launch: Config,
) -> list[Launch]:
    """What :func:`blend_lists_weight_grad` launches for this call, in order."""
    T, (N, chunks) = grads.numel(), partials.shape
    options = {
        "N": N,
        "HELD": launch.held,
        "STEPS": search_steps(T),
        "TYPE": TYPES[dtype],
        "GRAD": TYPES[grad_dtype],
        "BLOCK": launch.block,
        "CHUNK": BLOCKS * launch.block,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
    }
    arguments = (table, grads, partials, T, chunks)
    per_tensor = out.shape[0] > 1 or T == 1
    total_arguments = (partials, table if per_tensor else None, out, N, chunks)
    total_options = {"LANES": LANES, "num_warps": 4, "maxnreg": REGISTERS}
    return [
        Launch(blend_lists_weight_grad_partial_kernel, chunks, arguments, options),
        Launch(blend_lists_weight_grad_total_kernel, out.numel(), total_arguments, total_options),
    ]

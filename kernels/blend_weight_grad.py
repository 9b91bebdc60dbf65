"""blend_weight_grad on Triton: g[k, s, i] = sum over p in segment s of grad[k, p] * params[i, p].

Two stages in a fixed order, without atomics. Columns are cut at every multiple of BLOCK and at
every bound; the piece in column block c and segment s has slot c + s. Slots ascend with the columns
and no two pieces share one, so both stages find their way from the bounds alone: nobody has to
count the pieces of a segment first.
"""

from __future__ import annotations

import torch

from ._launch import (
    REGISTERS,
    Config,
    Launch,
    alignment,
    config,
    require,
    run,
    tl,
    triton,
    why_not_arena,
)
from ._segments import find_segment, search_steps

CHUNK = 4096  # partial sums that a program of the second stage adds at once


@triton.jit
def _sum_piece(
    grad_ptr, params_ptr, partials_ptr, mask, other, K, P, row_stride, slots,
    N: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partial sums of a piece: ROWS rows of grad are held, experts pass by, UNROLL at once."""
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    k = K * 0
    while k < K:  # the interpreter's range() refuses kernel arguments since numpy 2.4
        held = ()
        for j in tl.static_range(ROWS):
            row = tl.minimum(k + j, K - 1)  # a row too many is read twice and not stored
            held += (tl.load(grad_ptr + row * P + lanes, mask=mask, other=other),)
        for first in range(0, N, UNROLL):
            for u in tl.static_range(UNROLL):
                expert = params_ptr + (first + u) * row_stride
                x = tl.load(expert + lanes, mask=mask, other=other).to(ACC)
                for j in tl.static_range(ROWS):
                    entry = partials_ptr + ((k + j) * N + first + u) * slots
                    tl.store(entry, tl.sum(held[j].to(ACC) * x), mask=k + j < K)
        k += ROWS


@triton.jit(do_not_specialize=["K", "S", "slots", "column_units", "stride_units"])
def blend_weight_grad_partial_kernel(
    grad_ptr, params_ptr, bounds_ptr, partials_ptr,
    K: tl.int64, S: tl.int64, slots: tl.int64, column_units: tl.int64, stride_units: tl.int64,
    N: tl.constexpr, ROWS: tl.constexpr, UNROLL: tl.constexpr, STEPS: tl.constexpr,
    COLUMN_UNIT: tl.constexpr, STRIDE_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[k, i, slot] = sum over the columns p of a slot's piece of grad[k, p] * params[i, p].

    grad (K, P) contiguous; params (N, P), any row stride, column stride 1, both fp32, bf16, fp16
    or fp64; bounds (S+1,) int64, not read when S = 1; partials (K, N, slots) contiguous, fp32
    (fp64 for fp64 params). P and the row stride come as multiples of COLUMN_UNIT and STRIDE_UNIT.
    Accumulates in partials' type over at most BLOCK columns.
    Reads (N + K) * P * itemsize bytes once if K <= ROWS; for more rows a program reads its
    N * BLOCK values of params again, from cache. Writes K * N / BLOCK values per column.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    P = column_units.to(tl.int64) * COLUMN_UNIT
    row_stride = stride_units.to(tl.int64) * STRIDE_UNIT
    slot = tl.program_id(0).to(tl.int64)
    segment = find_segment(bounds_ptr, slot, S, STEPS, BLOCK)
    block = (slot - segment) * BLOCK
    start = block
    stop = tl.minimum(block + BLOCK, P)
    if STEPS > 0:
        start = tl.maximum(tl.maximum(block, tl.load(bounds_ptr + segment)), 0)
        stop = tl.minimum(stop, tl.load(bounds_ptr + segment + 1))
    if stop - start == BLOCK:
        _sum_piece(
            grad_ptr + block, params_ptr + block, partials_ptr + slot, None, None, K, P,
            row_stride, slots, N, ROWS, UNROLL, BLOCK,
        )  # fmt: skip
    elif start < stop:  # narrow accesses, as little code as possible: a small part of the columns
        lanes = tl.arange(0, BLOCK)
        mask = (lanes >= (start - block).to(tl.int32)) & (lanes < (stop - block).to(tl.int32))
        _sum_piece(
            grad_ptr + block, params_ptr + block, partials_ptr + slot, mask, 0.0, K, P,
            row_stride, slots, N, ROWS, 1, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["KN", "N", "S", "slots"])
def blend_weight_grad_total_kernel(
    partials_ptr, bounds_ptr, out_ptr, KN: tl.int64, N: tl.int64, S: tl.int64, slots: tl.int64,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out[k, s, i] = sum of partials[k, i, slot] over the slots of segment s.

    partials (K, N, slots) contiguous, fp32 or fp64; bounds (S+1,) int64, not read when S = 1;
    out (K, S, N) contiguous, partials' type. One program per output: in fp64, lane l adds slots l,
    l + CHUNK, ... of its segment, then a tree adds the lanes; one rounding at the end.
    Reads K * N * slots values once.
    """
    program = tl.program_id(0).to(tl.int64)
    segment = program // KN
    entry = program % KN
    first = segment * 0
    end = slots
    if bounds_ptr is not None:
        start = tl.load(bounds_ptr + segment)
        stop = tl.load(bounds_ptr + segment + 1)
        first = tl.maximum(start // BLOCK + segment, 0)
        end = tl.minimum((stop - 1) // BLOCK + segment + 1, slots)
        end = tl.where(start < stop, end, first)
    lanes = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), tl.float64)
    while first < end:
        slot = first + lanes
        partial = tl.load(partials_ptr + entry * slots + slot, mask=slot < end, other=0.0)
        total += partial.to(tl.float64)
        first += CHUNK
    place = ((entry // N) * S + segment) * N + entry % N
    tl.store(out_ptr + place, tl.sum(total).to(out_ptr.dtype.element_ty))


def why_not(
    grad: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return why_not_arena(params, segments)


def blend_weight_grad(
    grad: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None = None,
    launch: Config | None = None,
) -> torch.Tensor:
    """(N,), (K, N), (S, N) or (K, S, N) in the acc dtype; arguments as the op's, grad contiguous.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("blend_weight_grad", why_not(grad, params, segments))
    (N, P), S = params.shape, 1 if segments is None else segments.numel() - 1
    middle = () if segments is None else (S,)
    dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
    out = params.new_empty((*grad.shape[:-1], *middle, N), dtype=dtype)
    if out.numel() == 0 or P == 0:
        return out.zero_()
    launch = launch or config("blend_weight_grad", params.dtype, N, out.numel() // (S * N))
    slots = -(-P // launch.block) + S - 1
    partials = params.new_empty((out.numel() // S, slots), dtype=dtype)
    run(params, launches(grad, params, segments, partials, out, launch))
    return out


def launches(
    grad: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None,
    partials: torch.Tensor,
    out: torch.Tensor,
    launch: Config,
) -> list[Launch]:
    """What :func:`blend_weight_grad` launches for this call, in order."""
    (N, P), S = params.shape, 1 if segments is None else segments.numel() - 1
    KN, slots = partials.shape
    row_stride = params.stride(0) if N > 1 else 0
    column_unit, stride_unit = alignment(P), alignment(row_stride)
    bounds = segments.contiguous() if segments is not None and S > 1 else None
    units = (P // column_unit, row_stride // stride_unit)
    arguments = (grad.contiguous(), params, bounds, partials, KN // N, S, slots, *units)
    options = {
        "N": N,
        "ROWS": launch.held,
        "UNROLL": N if N <= 8 else 1,
        "STEPS": search_steps(S),
        "COLUMN_UNIT": column_unit,
        "STRIDE_UNIT": stride_unit,
        "BLOCK": launch.block,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
    }
    total_arguments = (partials, bounds, out, KN, N, S, slots)
    total_options = {
        "BLOCK": launch.block,
        "CHUNK": CHUNK,
        "num_warps": 8,
        "maxnreg": REGISTERS,
    }
    return [
        Launch(blend_weight_grad_partial_kernel, slots, arguments, options),
        Launch(blend_weight_grad_total_kernel, KN * S, total_arguments, total_options),
    ]

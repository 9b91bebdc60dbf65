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
def _add_columns(
    sums, grad_ptr, params_ptr, lanes, mask, other, k, i, K, P, row_stride,
    N: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``sums``, a vector per row and expert, plus the products of the columns ``lanes``, a matrix.

    Rows and experts past the last one are the last one again, and their sums are not stored. A row
    of ``lanes`` is what a thread loads at once: its products are added before they meet the sums,
    which would otherwise take a register for every column.
    """
    held, passing = (), ()
    for r in tl.static_range(ROWS):
        row = grad_ptr + tl.minimum(k + r, K - 1) * P
        held += (tl.load(row + lanes, mask=mask, other=other),)
    for n in tl.static_range(EXPERTS):
        expert = params_ptr + tl.minimum(i + n, N - 1) * row_stride
        passing += (tl.load(expert + lanes, mask=mask, other=other),)
    added = ()
    for r in tl.static_range(ROWS):
        for n in tl.static_range(EXPERTS):
            products = held[r].to(ACC) * passing[n].to(ACC)
            added += (sums[r * EXPERTS + n] + tl.sum(products, axis=1),)
    return added


@triton.jit
def _sum_piece(
    grad_ptr, params_ptr, partials_ptr, block, start, stop, masked: tl.constexpr, k, i, K, P,
    row_stride, slots, N: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr,
    PACK: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The partial sums of one piece: LANES columns at a time, and the lanes added at the end."""
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    PACKS: tl.constexpr = LANES // PACK
    sums = ()
    for _ in tl.static_range(ROWS * EXPERTS):
        sums += (tl.zeros((PACKS,), ACC),)
    places = tl.arange(0, PACKS)[:, None] * PACK + tl.arange(0, PACK)[None, :]
    if masked:
        while block < stop:  # no further than the piece goes
            lanes = block + places
            mask = (lanes >= start) & (lanes < stop)
            sums = _add_columns(
                sums, grad_ptr, params_ptr, lanes, mask, 0.0, k, i, K, P, row_stride,
                N, ROWS, EXPERTS, ACC,
            )  # fmt: skip
            block += LANES
    else:
        for offset in tl.range(0, BLOCK, LANES, num_stages=STAGES):
            lanes = block + offset + places
            sums = _add_columns(
                sums, grad_ptr, params_ptr, lanes, None, None, k, i, K, P, row_stride,
                N, ROWS, EXPERTS, ACC,
            )  # fmt: skip
    for r in tl.static_range(ROWS):
        for n in tl.static_range(EXPERTS):
            entry = partials_ptr + ((k + r) * N + i + n) * slots
            tl.store(entry, tl.sum(sums[r * EXPERTS + n]), mask=(k + r < K) & (i + n < N))


@triton.jit(do_not_specialize=["K", "S", "slots", "column_units", "stride_units"])
def blend_weight_grad_partial_kernel(
    grad_ptr, params_ptr, bounds_ptr, partials_ptr,
    K: tl.int64, S: tl.int64, slots: tl.int64, column_units: tl.int64, stride_units: tl.int64,
    N: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, STEPS: tl.constexpr,
    COLUMN_UNIT: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    PACK: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partials[k, i, slot] = sum over the columns p of a slot's piece of grad[k, p] * params[i, p].

    grad (K, P) contiguous; params (N, P), any row stride, column stride 1, both fp32, bf16, fp16
    or fp64; bounds (S+1,) int64, not read when S = 1; partials (K, N, slots) contiguous, fp32
    (fp64 for fp64 params). P and the row stride come as multiples of COLUMN_UNIT and STRIDE_UNIT.
    Accumulates in partials' type over at most BLOCK columns.
    A program sums ROWS gradients with EXPERTS experts; neighbouring programs take the next ones
    of the same columns, so that (N + K) * P * itemsize bytes come from memory, the rest from cache.
    Writes K * N / BLOCK values per column.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    P = column_units.to(tl.int64) * COLUMN_UNIT
    row_stride = stride_units.to(tl.int64) * STRIDE_UNIT
    expert_groups = (N + EXPERTS - 1) // EXPERTS
    groups = (K + ROWS - 1) // ROWS * expert_groups
    program = tl.program_id(0).to(tl.int64)
    slot = program // groups
    k = program % groups // expert_groups * ROWS
    i = program % expert_groups * EXPERTS
    segment = find_segment(bounds_ptr, slot, S, STEPS, BLOCK)
    block = (slot - segment) * BLOCK
    start = block
    stop = tl.minimum(block + BLOCK, P)
    if STEPS > 0:
        start = tl.maximum(tl.maximum(block, tl.load(bounds_ptr + segment)), 0)
        stop = tl.minimum(stop, tl.load(bounds_ptr + segment + 1))
    if stop - start == BLOCK:
        _sum_piece(
            grad_ptr, params_ptr, partials_ptr + slot, block, start, stop, False, k, i, K, P,
            row_stride, slots, N, ROWS, EXPERTS, PACK, LANES, BLOCK, STAGES,
        )  # fmt: skip
    elif start < stop:  # narrow accesses: a small part of the columns
        _sum_piece(
            grad_ptr, params_ptr, partials_ptr + slot, block, start, stop, True, k, i, K, P,
            row_stride, slots, N, ROWS, EXPERTS, PACK, LANES, BLOCK, STAGES,
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
    groups = -(-(KN // N) // launch.held) * -(-N // launch.experts)
    pack = max(min(16 // params.itemsize, launch.lanes // (32 * launch.num_warps)), 1)
    options = {
        "N": N,
        "ROWS": launch.held,
        "EXPERTS": launch.experts,
        "STEPS": search_steps(S),
        "COLUMN_UNIT": column_unit,
        "STRIDE_UNIT": stride_unit,
        "PACK": pack,
        "LANES": launch.lanes,
        "BLOCK": launch.block,
        "STAGES": launch.stages,
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
        Launch(blend_weight_grad_partial_kernel, slots * groups, arguments, options),
        Launch(blend_weight_grad_total_kernel, KN * S, total_arguments, total_options),
    ]

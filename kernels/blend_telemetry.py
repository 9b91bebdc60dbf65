"""blend_telemetry on Triton: a blend, and what it did to the parameters, in the same pass.

Two stages in a fixed order, without atomics, over slots of columns as in blend_weight_grad.
"""

from __future__ import annotations

import math

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
from ._rows import load_experts
from ._segments import find_segment, search_steps

CHUNK = 1024  # partial sums that a program of the second stage adds at once


@triton.jit
def _store_sum(ptr, values, valid):
    """The sum of the valid lanes: squares of floats in fp64, flags as a number."""
    if values.dtype == tl.int1:
        if valid is not None:
            values = values & valid
        tl.store(ptr, tl.sum(values.to(tl.int32)))
    else:
        wide = values.to(tl.float64)
        if valid is not None:
            wide = tl.where(valid, wide, 0.0)
        tl.store(ptr, tl.sum(wide * wide))


@triton.jit
def _measure_piece(
    w, params_ptr, out_ptr, squares_ptr, counts_ptr, mask, K, SN, P, row_stride, origin_offset,
    experts, slots, N: tl.constexpr, HELD: tl.constexpr, CENTRED: tl.constexpr, LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All that is told of a piece; pointers at its first column, its weights and its slot.

    ``experts`` is N, hidden from the compiler where it would unroll several turns and spill.
    """
    if HELD == N:
        experts = N
    ACC: tl.constexpr = w.dtype.element_ty
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    origin = tl.load(params_ptr + origin_offset + lanes, mask=mask).to(ACC)
    mean = tl.zeros((BLOCK,), ACC)
    if CENTRED:
        first = K * 0
        while first < experts:
            held = load_experts(params_ptr + first * row_stride, row_stride, lanes, mask, HELD)
            for j in tl.static_range(HELD):
                mean = mean + (held[j].to(ACC) - origin)
            first += HELD
        mean = mean * tl.full((BLOCK,), 1 / N, ACC)

    above = tl.zeros((BLOCK,), tl.int1)
    below = tl.zeros((BLOCK,), tl.int1)
    first = K * 0
    while first < experts:
        held = load_experts(params_ptr + first * row_stride, row_stride, lanes, mask, HELD)
        for j in tl.static_range(HELD):
            offset = held[j].to(ACC) - origin - mean
            above = above | (offset > 0)
            below = below | (offset < 0)
            _store_sum(squares_ptr + (first + j) * slots, offset, mask)
        first += HELD
    _store_sum(counts_ptr, above & below, mask)

    infinity = tl.full((BLOCK,), float("inf"), ACC)
    limit = tl.full((BLOCK,), LIMIT, ACC)
    k = K * 0
    while k < K:  # the interpreter's range() refuses kernel arguments since numpy 2.4
        acc = tl.zeros((BLOCK,), ACC)
        first = K * 0
        while first < experts:
            held = load_experts(params_ptr + first * row_stride, row_stride, lanes, mask, HELD)
            for j in tl.static_range(HELD):
                term = tl.load(w + k * SN + first + j) * held[j].to(ACC)
                if j == 0:  # 0 + -0 would lose the sign of the first term
                    acc = tl.where(first > 0, acc + term, term)
                else:
                    acc = acc + term
            first += HELD
        narrow = acc
        if not OUT.is_fp64():  # via fp32 to the 16-bit types, as PyTorch converts fp64
            narrow = acc.to(tl.float32)
        tl.store(out_ptr + k * P + lanes, narrow.to(OUT), mask=mask)
        wide = narrow.to(ACC)
        beyond = ((wide < limit) & (wide > -limit)) == 0
        finite = (acc < infinity) & (acc > -infinity)
        _store_sum(squares_ptr + (N + k) * slots, acc - origin - mean, mask)
        _store_sum(counts_ptr + (1 + k) * slots, beyond, mask)
        _store_sum(counts_ptr + (1 + K + k) * slots, beyond & finite, mask)
        k += 1


@triton.jit(
    do_not_specialize=["K", "S", "experts", "slots", "origin", "column_units", "stride_units"]
)
def blend_telemetry_partial_kernel(
    weights_ptr, params_ptr, bounds_ptr, out_ptr, squares_ptr, counts_ptr,
    K: tl.int64, S: tl.int64, experts: tl.int64, slots: tl.int64, origin: tl.int64,
    column_units: tl.int64, stride_units: tl.int64,
    N: tl.constexpr, HELD: tl.constexpr, CENTRED: tl.constexpr, LIMIT: tl.constexpr,
    STEPS: tl.constexpr, COLUMN_UNIT: tl.constexpr, STRIDE_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The blend of a slot's piece, and squares and counts of it.

    weights (K, S, N) contiguous, fp32 (fp64 for fp64 params); params (N, P), any row stride, column
    stride 1, fp32, bf16, fp16 or fp64; bounds (S+1,) int64, not read when S = 1; out (K, P)
    contiguous in any of these; squares (N + K, slots) fp64: experts, outputs; counts (1 + 2K,
    slots) int32: conflicts, nonfinite, saturated. Offsets start from row `origin`, or, CENTRED,
    from the mean. LIMIT: the smallest magnitude that out's type cannot hold.
    Accumulates in weights' type, squares in fp64. Moves N * P values in and K * P out, once: what a
    program reads again, HELD experts at a time, is its own N * BLOCK values, from cache.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    P = column_units.to(tl.int64) * COLUMN_UNIT
    row_stride = stride_units.to(tl.int64) * STRIDE_UNIT
    SN = S.to(tl.int64) * N
    origin_offset = origin.to(tl.int64) * row_stride
    slot = tl.program_id(0).to(tl.int64)
    segment = find_segment(bounds_ptr, slot, S, STEPS, BLOCK)
    block = (slot - segment) * BLOCK
    start = block
    stop = tl.minimum(block + BLOCK, P)
    if STEPS > 0:
        start = tl.maximum(tl.maximum(block, tl.load(bounds_ptr + segment)), 0)
        stop = tl.minimum(stop, tl.load(bounds_ptr + segment + 1))
    w = weights_ptr + segment * N
    if stop - start == BLOCK:
        _measure_piece(
            w, params_ptr + block, out_ptr + block, squares_ptr + slot, counts_ptr + slot, None,
            K, SN, P, row_stride, origin_offset, experts, slots,
            N, HELD, CENTRED, LIMIT, BLOCK,
        )  # fmt: skip
    elif start < stop:
        lanes = tl.arange(0, BLOCK)
        mask = (lanes >= (start - block).to(tl.int32)) & (lanes < (stop - block).to(tl.int32))
        _measure_piece(
            w, params_ptr + block, out_ptr + block, squares_ptr + slot, counts_ptr + slot, mask,
            K, SN, P, row_stride, origin_offset, experts, slots,
            N, HELD, CENTRED, LIMIT, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "split", "S", "slots"])
def blend_telemetry_total_kernel(
    partials_ptr, bounds_ptr, first_ptr, second_ptr,
    rows: tl.int64, split: tl.int64, S: tl.int64, slots: tl.int64,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Sums of partials (rows, slots) over the slots of each segment.

    The first ``split`` rows to first (S, split), the others to second (rows - split, S), both
    contiguous. bounds (S+1,) int64, not read when S = 1. One program per sum, in the type of the
    results: lane l adds slots l, l + CHUNK, ... of its segment, then a tree adds the lanes.
    """
    OUT: tl.constexpr = first_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    segment = program // rows
    row = program % rows
    begin = segment * 0
    end = slots
    if bounds_ptr is not None:
        start = tl.load(bounds_ptr + segment)
        stop = tl.load(bounds_ptr + segment + 1)
        begin = tl.maximum(start // BLOCK + segment, 0)
        end = tl.minimum((stop - 1) // BLOCK + segment + 1, slots)
        end = tl.where(start < stop, end, begin)
    lanes = tl.arange(0, CHUNK)
    total = tl.zeros((CHUNK,), OUT)
    while begin < end:
        slot = begin + lanes
        total += tl.load(partials_ptr + row * slots + slot, mask=slot < end, other=0).to(OUT)
        begin += CHUNK
    if row < split:
        tl.store(first_ptr + segment * split + row, tl.sum(total))
    else:
        tl.store(second_ptr + (row - split) * S + segment, tl.sum(total))


def why_not(
    weights: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None, *_: object
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return why_not_arena(params, segments)


Results = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def blend_telemetry(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    base: int | None = None,
    launch: Config | None = None,
) -> Results:
    """The op's results; arguments as the op's, weights in the acc dtype.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("blend_telemetry", why_not(weights, params, segments))
    (N, P), leading = params.shape, weights.shape[: -1 if segments is None else -2]
    count = () if segments is None else (segments.numel() - 1,)
    results = (
        params.new_empty((*leading, P), dtype=out_dtype or params.dtype),
        params.new_empty((2, *leading, *count), dtype=torch.int64),
        params.new_empty((*count, N), dtype=torch.float64),
        params.new_empty((*leading, *count), dtype=torch.float64),
        params.new_empty(count, dtype=torch.int64),
    )
    if P == 0:
        for result in results:
            result.zero_()
        return results
    K = math.prod(leading)
    launch = launch or config("blend_telemetry", params.dtype, N, K)
    slots = -(-P // launch.block) + math.prod(count) - 1
    squares = params.new_empty((N + K, slots), dtype=torch.float64)
    counts = params.new_empty((1 + 2 * K, slots), dtype=torch.int32)
    run(params, launches(weights, params, segments, base, squares, counts, results, launch))
    return results


def overflow_limit(dtype: torch.dtype) -> float:
    """The smallest magnitude of an fp32 number that rounds to infinity in ``dtype``."""
    if dtype in (torch.float32, torch.float64):
        return math.inf
    info = torch.finfo(dtype)
    return info.max + info.eps * 2.0 ** math.floor(math.log2(info.max)) / 2


def launches(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None,
    base: int | None,
    squares: torch.Tensor,
    counts: torch.Tensor,
    results: Results,
    launch: Config,
) -> list[Launch]:
    """What :func:`blend_telemetry` launches for this call, in order."""
    theta, totals, expert_squares, merged_squares, conflicts = results
    (N, P), S = params.shape, 1 if segments is None else segments.numel() - 1
    K, slots = squares.shape[0] - N, squares.shape[1]
    row_stride = params.stride(0) if N > 1 else 0
    column_unit, stride_unit = alignment(P), alignment(row_stride)
    bounds = segments.contiguous() if segments is not None and S > 1 else None
    arguments = (
        *(weights.contiguous(), params, bounds, theta, squares, counts),
        *(K, S, N, slots, base or 0, P // column_unit, row_stride // stride_unit),
    )
    options = {
        "N": N,
        "HELD": launch.held,
        "CENTRED": base is None,
        "LIMIT": overflow_limit(theta.dtype),
        "STEPS": search_steps(S),
        "COLUMN_UNIT": column_unit,
        "STRIDE_UNIT": stride_unit,
        "BLOCK": launch.block,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
        "enable_fp_fusion": False,  # multiply, then add
    }
    total = blend_telemetry_total_kernel
    total_options = {"BLOCK": launch.block, "CHUNK": CHUNK, "num_warps": 4, "maxnreg": REGISTERS}
    square_sums = (squares, bounds, expert_squares, merged_squares, N + K, N, S, slots)
    count_sums = (counts, bounds, conflicts, totals, 1 + 2 * K, 1, S, slots)
    return [
        Launch(blend_telemetry_partial_kernel, slots, arguments, options),
        Launch(total, (N + K) * S, square_sums, total_options),
        Launch(total, (1 + 2 * K) * S, count_sums, total_options),
    ]

"""offset_gram on Triton: sums and Gram matrices of the experts' offsets from their mean.

Three stages in a fixed order, without atomics. Partial sums of offsets and of their products, over
pieces of columns with slots as in blend_weight_grad; their totals per segment; and from there, in
fp64, to the results. Offsets, rows and the order of totals are those of csrc/common/offsets.h:
d_i = theta_i - theta_0, less their mean; row r is expert r + 1. All experts but number 0 in one
group need no row of it. Where there are more groups, a kernel before the others writes the means.
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
from ._offsets import add_columns
from ._segments import find_segment, search_steps
from .blend_weight_grad import CHUNK, blend_weight_grad_total_kernel


@triton.jit
def _store(partials_ptr, slots, sums, a, b, R: tl.constexpr, COUNT: tl.constexpr,
           SAME: tl.constexpr):  # fmt: skip
    """One number per total of rows a .. and b .., those of R that exist."""
    if SAME:
        for i in tl.static_range(COUNT):
            tl.store(partials_ptr + (a + i) * slots, tl.sum(sums[i]), mask=a + i < R)
    for j in tl.static_range(COUNT):
        first = partials_ptr + (R + (b + j) * (b + j + 1) // 2 + a) * slots
        if SAME:
            for i in tl.static_range(j + 1):
                value = tl.sum(sums[COUNT + j * (j + 1) // 2 + i])
                tl.store(first + i * slots, value, mask=b + j < R)
        else:
            for i in tl.static_range(COUNT):
                tl.store(first + i * slots, tl.sum(sums[j * COUNT + i]), mask=b + j < R)


@triton.jit
def _sum_group(
    params_ptr, means_ptr, partials_ptr, a, b, row_stride, slots, start, stop, N: tl.constexpr,
    COUNT: tl.constexpr, SAME: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    LANES: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The partial sums of COUNT rows from a on, among themselves or with those from b on."""
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    STEP: tl.constexpr = ROWS * LANES
    sums = ()
    for _ in tl.static_range(COUNT * (COUNT + 3) // 2 if SAME else COUNT * COUNT):
        sums += (tl.zeros((ROWS,), ACC),)
    if start is None:
        for p in tl.range(0, BLOCK, STEP, num_stages=STAGES):
            sums = add_columns(
                sums, params_ptr, means_ptr, a, b, row_stride, p, None, None,
                N, COUNT, SAME, ACC, ROWS, LANES, WIDE,
            )  # fmt: skip
    else:
        p = start // STEP * STEP
        while p < stop:  # no further than the piece goes
            sums = add_columns(
                sums, params_ptr, means_ptr, a, b, row_stride, p, start, stop,
                N, COUNT, SAME, ACC, ROWS, LANES, WIDE,
            )  # fmt: skip
            p += STEP
    R: tl.constexpr = N - 1 if means_ptr is None else N
    _store(partials_ptr, slots, sums, a, b, R, COUNT, SAME)


@triton.jit
def _sum_piece(
    params_ptr, means_ptr, partials_ptr, row_stride, slots, start, stop, N: tl.constexpr,
    COUNT: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All partial sums of a piece: group after group of COUNT rows, and pairs of groups.

    start None: a whole block.
    """
    a = slots * 0
    if means_ptr is None:
        _sum_group(
            params_ptr, means_ptr, partials_ptr, a, a, row_stride, slots, start, stop,
            N, COUNT, True, BLOCK, ROWS, LANES, WIDE, STAGES,
        )  # fmt: skip
    else:
        while a < N:
            _sum_group(
                params_ptr, means_ptr, partials_ptr, a, a, row_stride, slots, start, stop,
                N, COUNT, True, BLOCK, ROWS, LANES, WIDE, STAGES,
            )  # fmt: skip
            b = a + COUNT
            while b < N:
                _sum_group(
                    params_ptr, means_ptr, partials_ptr, a, b, row_stride, slots, start, stop,
                    N, COUNT, False, BLOCK, ROWS, LANES, WIDE, STAGES,
                )  # fmt: skip
                b += COUNT
            a += COUNT


@triton.jit(do_not_specialize=["columns", "row_stride"])
def offset_gram_mean_kernel(
    params_ptr, means_ptr, columns: tl.int64, row_stride: tl.int64,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """means[p] = mean_i params[i, p] - params[0, p]; (N, P) and (P,), in means' type.

    One program per BLOCK columns. Reads N * P values and writes P.
    """
    ACC: tl.constexpr = means_ptr.dtype.element_ty
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = p < columns
    origin = tl.load(params_ptr + p, mask=mask, other=0.0).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    for i in range(1, N):
        total += tl.load(params_ptr + i * row_stride + p, mask=mask, other=0.0).to(ACC) - origin
    tl.store(means_ptr + p, total * tl.full((1,), 1 / N, ACC), mask=mask)


@triton.jit(do_not_specialize=["S", "slots", "columns", "stride_units"])
def offset_gram_partial_kernel(
    params_ptr, means_ptr, bounds_ptr, partials_ptr,
    S: tl.int64, slots: tl.int64, columns: tl.int64, stride_units: tl.int64,
    N: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partials[t, slot] = sum over the columns p of a piece of xi_i[p], or xi_i[p] * xi_j[p].

    params (N, P), any row stride, column stride 1, fp32, bf16, fp16 or fp64; means (P,), None if
    COUNT is N - 1; bounds (S+1,) int64, not read when S = 1; partials (totals, slots) contiguous,
    fp32 (fp64 for fp64 params). The row stride comes as a multiple of STRIDE_UNIT elements. BLOCK,
    the width of a piece, is a multiple of ROWS * LANES columns, what a program subtracts at once.
    Accumulates in partials' type, over at most BLOCK columns.
    Reads N * P * itemsize bytes, once without means; else a program reads its columns again for
    each pair of groups of COUNT rows, from cache.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    P = columns.to(tl.int64)
    row_stride = stride_units.to(tl.int64) * STRIDE_UNIT
    slot = tl.program_id(0).to(tl.int64)
    segment = find_segment(bounds_ptr, slot, S, STEPS, BLOCK)
    block = (slot - segment) * BLOCK
    begin = block
    end = tl.minimum(block + BLOCK, P)
    if STEPS > 0:
        begin = tl.maximum(tl.maximum(block, tl.load(bounds_ptr + segment)), 0)
        end = tl.minimum(end, tl.load(bounds_ptr + segment + 1))
    if means_ptr is not None:
        means_ptr += block
    start = (begin - block).to(tl.int32)
    stop = (end - block).to(tl.int32)
    if end - begin == BLOCK:
        _sum_piece(
            params_ptr + block, means_ptr, partials_ptr + slot, row_stride, slots, None, None,
            N, COUNT, BLOCK, ROWS, LANES, True, STAGES,
        )  # fmt: skip
    elif (begin < end) & (start % LANES == 0) & (stop % LANES == 0):
        _sum_piece(
            params_ptr + block, means_ptr, partials_ptr + slot, row_stride, slots, start, stop,
            N, COUNT, BLOCK, ROWS, LANES, True, STAGES,
        )  # fmt: skip
    elif begin < end:
        _sum_piece(
            params_ptr + block, means_ptr, partials_ptr + slot, row_stride, slots, start, stop,
            N, COUNT, BLOCK, ROWS, LANES, False, STAGES,
        )  # fmt: skip


@triton.jit
def offset_gram_complete_kernel(
    totals_ptr, sums_ptr, gram_ptr, N: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr
):
    """sums (S, N) and gram (S, N, N) from the totals of R rows (S, R * (R + 3) / 2), all fp64.

    One program per segment, on a square of SIZE >= N. N * N numbers in and out.
    """
    segment = tl.program_id(0).to(tl.int64)
    totals = totals_ptr + segment * (R * (R + 3) // 2)
    i = tl.arange(0, SIZE)
    row = (i + N - 1) % N
    a = row[:, None]
    b = row[None, :]
    low = tl.minimum(a, b)
    high = tl.maximum(a, b)
    total = tl.load(totals + row, mask=row < R, other=0.0)
    product = tl.load(totals + R + high * (high + 1) // 2 + low, mask=high < R, other=0.0)
    if R < N:  # what expert 0 lacks to zero
        real = i < N
        total -= tl.where(i == 0, tl.sum(tl.where(real, total, 0.0)), 0.0)
        product = tl.where(real[:, None] & real[None, :], product, 0.0)
        lacks = tl.sum(product, 0)
        product -= tl.where(i == 0, 1.0, 0.0)[:, None] * lacks[None, :]
        product -= tl.where(i == 0, 1.0, 0.0)[None, :] * tl.sum(product, 1)[:, None]
    tl.store(sums_ptr + segment * N + i, total, mask=i < N)
    out = gram_ptr + segment * N * N + i[:, None] * N + i[None, :]
    tl.store(out, product, mask=(i < N)[:, None] & (i < N)[None, :])


def why_not(params: torch.Tensor, segments: torch.Tensor | None = None) -> str | None:
    """Why Triton cannot take this call, or None."""
    return why_not_arena(params, segments)


def offset_gram(
    params: torch.Tensor, segments: torch.Tensor | None = None, launch: Config | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """sums (S, N) and gram (S, N, N) in fp64; arguments as the op's.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("offset_gram", why_not(params, segments))
    (N, P), S = params.shape, 1 if segments is None else segments.numel() - 1
    sums = params.new_empty((S, N), dtype=torch.float64)
    gram = params.new_empty((S, N, N), dtype=torch.float64)
    if S == 0 or P == 0 or N == 1:
        return sums.zero_(), gram.zero_()
    launch = launch or config("offset_gram", params.dtype, N, 1)
    run(params, launches(params, segments, *scratch(params, S, launch), sums, gram, launch))
    return sums, gram


def scratch(
    params: torch.Tensor, S: int, launch: Config
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """means, partials and totals for S segments, as the kernels want them."""
    N, P = params.shape
    all_at_once = launch.held == N - 1
    rows, slots = N - all_at_once, -(-P // launch.block) + S - 1
    count = rows * (rows + 3) // 2
    dtype = torch.promote_types(params.dtype, torch.float32)
    means = None if all_at_once else params.new_empty(P, dtype=dtype)
    partials = params.new_empty((count, slots), dtype=dtype)
    return means, partials, params.new_empty((S, count), dtype=torch.float64)


def launches(
    params: torch.Tensor,
    segments: torch.Tensor | None,
    means: torch.Tensor | None,
    partials: torch.Tensor,
    totals: torch.Tensor,
    sums: torch.Tensor,
    gram: torch.Tensor,
    launch: Config,
) -> list[Launch]:
    """What :func:`offset_gram` launches for this call, in order."""
    (N, P), (S, count), slots = params.shape, totals.shape, partials.shape[1]
    row_stride = params.stride(0)
    stride_unit = alignment(row_stride)
    bounds = segments.contiguous() if segments is not None and S > 1 else None
    arguments = (params, means, bounds, partials, S, slots, P, row_stride // stride_unit)
    options = {
        "N": N,
        "COUNT": launch.held,
        "STEPS": search_steps(S),
        "STRIDE_UNIT": stride_unit,
        "BLOCK": launch.block,
        "ROWS": 32 * launch.num_warps,
        "LANES": launch.lanes,
        "STAGES": launch.stages,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
    }
    total_arguments = (partials, bounds, totals, count, count, S, slots)
    total_options = {"BLOCK": launch.block, "CHUNK": CHUNK, "num_warps": 8, "maxnreg": REGISTERS}
    rows = N if means is not None else N - 1
    complete_options = {"N": N, "R": rows, "SIZE": triton.next_power_of_2(N)}
    found = [
        Launch(offset_gram_partial_kernel, slots, arguments, options),
        Launch(blend_weight_grad_total_kernel, S * count, total_arguments, total_options),
        Launch(offset_gram_complete_kernel, S, (totals, sums, gram), complete_options),
    ]
    if means is not None:
        mean_options = {"N": N, "BLOCK": 1024, "num_warps": 4}
        mean_arguments = (params, means, P, row_stride)
        found.insert(
            0, Launch(offset_gram_mean_kernel, -(-P // 1024), mean_arguments, mean_options)
        )
    return found

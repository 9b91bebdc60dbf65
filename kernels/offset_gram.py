"""offset_gram on Triton: sums and Gram matrices of the experts' offsets from their mean.

Three stages in a fixed order, without atomics. Partial sums of the differences d_i = theta_i -
theta_0 and of their products, over pieces of columns with slots as in blend_weight_grad; their
totals per segment; and, in fp64, from there to offsets from the mean (csrc/common/offsets.h has the
formula and the order of the totals: N - 1 sums, then the products of experts 1 <= i <= j).
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
from .blend_weight_grad import CHUNK, blend_weight_grad_total_kernel


@triton.jit
def _load_row(
    row_ptr, p, start, stop, ACC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Columns p .. of a row, (ROWS, LANES) in type ACC; zeros outside start .. stop.

    WIDE: start and stop are multiples of LANES, and no access of LANES columns is cut.
    """
    rows = p + tl.arange(0, ROWS)[:, None] * LANES
    columns = rows + tl.arange(0, LANES)[None, :]
    inside = rows if WIDE else columns
    x = tl.load(row_ptr + columns, mask=(inside >= start) & (inside < stop), other=0.0)
    return x.to(ACC)


@triton.jit
def _differences(
    params_ptr, first, row_stride, p, start, stop, N: tl.constexpr, COUNT: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """COUNT experts from ``first`` on less expert 0; an expert too many is read as the last one."""
    origin = _load_row(params_ptr, p, start, stop, ACC, ROWS, LANES, WIDE)
    d = ()
    for i in tl.static_range(COUNT):
        row_ptr = params_ptr + tl.minimum(first + i, N - 1) * row_stride
        d += (_load_row(row_ptr, p, start, stop, ACC, ROWS, LANES, WIDE) - origin,)
    return d


@triton.jit
def _add(sums, d, e, COUNT: tl.constexpr, SAME: tl.constexpr):
    """sums + d_i and + d_i e_j, i <= j, if SAME; + d_i e_j otherwise. LANES become one number."""
    added = ()
    if SAME:
        for i in tl.static_range(COUNT):
            added += (sums[i] + tl.sum(d[i], 1),)
        for j in tl.static_range(COUNT):
            for i in tl.static_range(j + 1):
                added += (sums[COUNT + j * (j + 1) // 2 + i] + tl.sum(d[i] * e[j], 1),)
    else:
        for j in tl.static_range(COUNT):
            for i in tl.static_range(COUNT):
                added += (sums[j * COUNT + i] + tl.sum(d[i] * e[j], 1),)
    return added


@triton.jit
def _store(partials_ptr, slots, sums, a, b, N: tl.constexpr, COUNT: tl.constexpr,
           SAME: tl.constexpr):  # fmt: skip
    """One number per total of experts a .. and b .., those that exist."""
    if SAME:
        for i in tl.static_range(COUNT):
            tl.store(partials_ptr + (a + i - 1) * slots, tl.sum(sums[i]), mask=a + i < N)
    for j in tl.static_range(COUNT):
        first = partials_ptr + (N - 1 + (b + j) * (b + j - 1) // 2 + a - 1) * slots
        if SAME:
            for i in tl.static_range(j + 1):
                value = tl.sum(sums[COUNT + j * (j + 1) // 2 + i])
                tl.store(first + i * slots, value, mask=b + j < N)
        else:
            for i in tl.static_range(COUNT):
                tl.store(first + i * slots, tl.sum(sums[j * COUNT + i]), mask=b + j < N)


@triton.jit
def _sum_group(
    params_ptr, partials_ptr, a, b, row_stride, slots, start, stop, N: tl.constexpr,
    COUNT: tl.constexpr, SAME: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """The partial sums of COUNT experts from a on, among themselves or with those from b on."""
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    sums = ()
    for _ in tl.static_range(COUNT * (COUNT + 3) // 2 if SAME else COUNT * COUNT):
        sums += (tl.zeros((ROWS,), ACC),)
    p = start // (ROWS * LANES) * (ROWS * LANES)
    while p < stop:
        d = _differences(
            params_ptr, a, row_stride, p, start, stop, N, COUNT, ACC, ROWS, LANES, WIDE
        )  # fmt: skip
        if SAME:
            sums = _add(sums, d, d, COUNT, SAME)
        else:
            e = _differences(
                params_ptr, b, row_stride, p, start, stop, N, COUNT, ACC, ROWS, LANES, WIDE
            )  # fmt: skip
            sums = _add(sums, d, e, COUNT, SAME)
        p += ROWS * LANES
    _store(partials_ptr, slots, sums, a, b, N, COUNT, SAME)


@triton.jit
def _sum_piece(
    params_ptr, partials_ptr, row_stride, slots, start, stop, N: tl.constexpr,
    COUNT: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """All partial sums of a piece: group after group of COUNT experts, and pairs of groups."""
    a = slots * 0 + 1
    while a < N:
        _sum_group(
            params_ptr, partials_ptr, a, a, row_stride, slots, start, stop,
            N, COUNT, True, ROWS, LANES, WIDE,
        )  # fmt: skip
        if COUNT < N - 1:
            b = a + COUNT
            while b < N:
                _sum_group(
                    params_ptr, partials_ptr, a, b, row_stride, slots, start, stop,
                    N, COUNT, False, ROWS, LANES, WIDE,
                )  # fmt: skip
                b += COUNT
        a += COUNT


@triton.jit(do_not_specialize=["S", "slots", "columns", "stride_units"])
def offset_gram_partial_kernel(
    params_ptr, bounds_ptr, partials_ptr,
    S: tl.int64, slots: tl.int64, columns: tl.int64, stride_units: tl.int64,
    N: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """partials[t, slot] = sum over the columns p of a slot's piece of d_i[p], or d_i[p] * d_j[p].

    d_i = params[i] - params[0]; params (N, P), any row stride, column stride 1, fp32, bf16, fp16 or
    fp64; bounds (S+1,) int64, not read when S = 1; partials (totals, slots) contiguous, fp32 (fp64
    for fp64 params). The row stride comes as a multiple of STRIDE_UNIT elements. BLOCK, the width
    of a piece, is a multiple of ROWS * LANES columns, what a program subtracts at once.
    Accumulates in partials' type, over at most BLOCK columns.
    Reads N * P * itemsize bytes, once if N <= COUNT + 1; else a program reads its columns again for
    each pair of groups of COUNT experts, from cache.
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
    start = (begin - block).to(tl.int32)
    stop = (end - block).to(tl.int32)
    if (begin < end) & (start % LANES == 0) & (stop % LANES == 0):
        _sum_piece(
            params_ptr + block, partials_ptr + slot, row_stride, slots, start, stop,
            N, COUNT, ROWS, LANES, True,
        )  # fmt: skip
    elif begin < end:
        _sum_piece(
            params_ptr + block, partials_ptr + slot, row_stride, slots, start, stop,
            N, COUNT, ROWS, LANES, False,
        )  # fmt: skip


@triton.jit
def offset_gram_centre_kernel(
    totals_ptr, sums_ptr, gram_ptr, N: tl.constexpr, TOTALS: tl.constexpr, SIZE: tl.constexpr
):
    """sums (S, N) and gram (S, N, N) from totals (S, TOTALS), all contiguous fp64.

    One program per segment, on a square of SIZE >= N. N * N numbers in and out.
    """
    segment = tl.program_id(0).to(tl.int64)
    totals = totals_ptr + segment * TOTALS
    i = tl.arange(0, SIZE)
    total = tl.load(totals + i - 1, mask=(i >= 1) & (i < N), other=0.0)
    tl.store(sums_ptr + segment * N + i, total - tl.sum(total) / N, mask=i < N)
    row = i[:, None]
    column = i[None, :]
    low = tl.minimum(row, column)
    high = tl.maximum(row, column)
    at = totals + N - 1 + high * (high - 1) // 2 + low - 1
    product = tl.load(at, mask=(low >= 1) & (high < N), other=0.0)
    mean = tl.sum(product, 1) / N
    centred = product - (mean[:, None] + mean[None, :] - tl.sum(mean) / N)
    out = gram_ptr + segment * N * N + row * N + column
    tl.store(out, centred, mask=high < N)


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
    dtype = torch.float64 if params.dtype == torch.float64 else torch.float32
    count, slots = (N - 1) * (N + 2) // 2, -(-P // launch.block) + S - 1
    partials = params.new_empty((count, slots), dtype=dtype)
    totals = params.new_empty((S, count), dtype=torch.float64)
    run(params, launches(params, segments, partials, totals, sums, gram, launch))
    return sums, gram


def launches(
    params: torch.Tensor,
    segments: torch.Tensor | None,
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
    arguments = (params, bounds, partials, S, slots, P, row_stride // stride_unit)
    options = {
        "N": N,
        "COUNT": launch.held,
        "STEPS": search_steps(S),
        "STRIDE_UNIT": stride_unit,
        "BLOCK": launch.block,
        "ROWS": 32 * launch.num_warps,
        "LANES": launch.lanes,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
    }
    total_arguments = (partials, bounds, totals, count, count, S, slots)
    total_options = {"BLOCK": launch.block, "CHUNK": CHUNK, "num_warps": 8, "maxnreg": REGISTERS}
    centre_options = {"N": N, "TOTALS": count, "SIZE": triton.next_power_of_2(N)}
    return [
        Launch(offset_gram_partial_kernel, slots, arguments, options),
        Launch(blend_weight_grad_total_kernel, S * count, total_arguments, total_options),
        Launch(offset_gram_centre_kernel, S, (totals, sums, gram), centre_options),
    ]

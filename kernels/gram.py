"""gram on Triton: inner products of rows, or of their differences to a base.

Two stages in a fixed order, without atomics: partial sums of products over pieces of columns with
slots as in blend_weight_grad, for each pair of groups of rows, and their totals per segment, in
fp64.
"""

from __future__ import annotations

import torch

from ._launch import (
    REGISTERS,
    Config,
    Launch,
    config,
    require,
    run,
    stride,
    tl,
    triton,
    why_not_arena,
)
from ._segments import find_segment, search_steps
from .blend_weight_grad import CHUNK, blend_weight_grad_total_kernel


@triton.jit
def _load(params_ptr, base_ptr, first, row_stride, p, mask, N: tl.constexpr, COUNT: tl.constexpr,
          ACC: tl.constexpr):  # fmt: skip
    """COUNT rows from ``first`` on, less the base; row N - 1 stands for those beyond it."""
    origin = tl.zeros(p.shape, ACC)
    if base_ptr is not None:
        origin = tl.load(base_ptr + p, mask=mask, other=0.0).to(ACC)
    rows = ()
    for i in tl.static_range(COUNT):
        row = tl.minimum(first + i, N - 1)
        x = tl.load(params_ptr + row * row_stride + p, mask=mask, other=0.0).to(ACC)
        rows += (x - origin if base_ptr is not None else x,)
    return rows


@triton.jit
def _add(sums, x, y, COUNT: tl.constexpr):
    """sums + x_i y_j."""
    added = ()
    for i in tl.static_range(COUNT):
        for j in tl.static_range(COUNT):
            added += (sums[i * COUNT + j] + x[i] * y[j],)
    return added


@triton.jit(do_not_specialize=["S", "slots", "columns"])
def gram_partial_kernel(
    params_ptr, base_ptr, bounds_ptr, partials_ptr, S: tl.int64, slots: tl.int64,
    columns: tl.int64, row_stride, N: tl.constexpr, COUNT: tl.constexpr, STEPS: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """partials[j (j + 1) / 2 + i, slot] = sum over a piece's columns p of d_i[p] d_j[p], i <= j.

    params (N, P), any row stride, column stride 1, fp32, bf16, fp16 or fp64; base (P,) likewise or
    None; bounds (S + 1,) int64, not read when S = 1; partials (N (N + 1) / 2, slots) contiguous,
    fp32 (fp64 for fp64 params), the type of the sums over at most BLOCK columns, LANES at a time.
    One program per slot and pair of groups of COUNT rows: where one group is all rows they are read
    once, else once for each pair, (N + 1) P values.
    """
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    GROUPS: tl.constexpr = (N + COUNT - 1) // COUNT
    # The interpreter gives an annotated argument the smallest type that holds it.
    P = columns.to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) % (GROUPS * GROUPS)
    slot = tl.program_id(0).to(tl.int64) // (GROUPS * GROUPS)
    a = pair // GROUPS * COUNT
    b = pair % GROUPS * COUNT
    segment = find_segment(bounds_ptr, slot, S, STEPS, BLOCK)
    block = (slot - segment) * BLOCK
    begin = block
    end = tl.minimum(block + BLOCK, P)
    if STEPS > 0:
        begin = tl.maximum(tl.maximum(block, tl.load(bounds_ptr + segment)), 0)
        end = tl.minimum(end, tl.load(bounds_ptr + segment + 1))
    if a <= b:
        sums = ()
        for _ in tl.static_range(COUNT * COUNT):
            sums += (tl.zeros((LANES,), ACC),)
        first = block + (begin - block) // LANES * LANES
        while first < end:
            p = first + tl.arange(0, LANES)
            mask = (p >= begin) & (p < end)
            x = _load(params_ptr, base_ptr, a, row_stride, p, mask, N, COUNT, ACC)
            y = _load(params_ptr, base_ptr, b, row_stride, p, mask, N, COUNT, ACC)
            sums = _add(sums, x, y, COUNT)
            first += LANES
        for i in tl.static_range(COUNT):
            for j in tl.static_range(COUNT):
                to = partials_ptr + ((b + j) * (b + j + 1) // 2 + a + i) * slots + slot
                inside = (a + i <= b + j) & (b + j < N)
                tl.store(to, tl.sum(sums[i * COUNT + j]), mask=inside)


def why_not(
    params: torch.Tensor, base: torch.Tensor | None = None, segments: torch.Tensor | None = None
) -> str | None:
    """Why Triton cannot take this call, or None."""
    if base is not None and base.shape[0] > 1 and base.stride(0) != 1:
        return f"base is not contiguous (stride {base.stride(0)})"
    return why_not_arena(params, segments)


def gram(
    params: torch.Tensor,
    base: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    launch: Config | None = None,
) -> torch.Tensor:
    """gram (S, N, N) in fp64; arguments as the op's.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("gram", why_not(params, base, segments))
    N, S = params.shape[0], 1 if segments is None else segments.numel() - 1
    totals = params.new_zeros((S, N * (N + 1) // 2), dtype=torch.float64)
    if totals.numel() > 0 and params.shape[1] > 0:
        launch = launch or config("gram", params.dtype, N, 1)
        run(params, launches(params, base, segments, totals, launch))
    i = torch.arange(N, device=params.device)
    low, high = torch.minimum(i[:, None], i), torch.maximum(i[:, None], i)
    return totals[:, high * (high + 1) // 2 + low]


def launches(
    params: torch.Tensor,
    base: torch.Tensor | None,
    segments: torch.Tensor | None,
    totals: torch.Tensor,
    launch: Config,
) -> list[Launch]:
    """What :func:`gram` launches for this call, in order; totals (S, N (N + 1) / 2)."""
    (N, P), (S, count) = params.shape, totals.shape
    slots, groups = -(-P // launch.block) + S - 1, -(-N // launch.held)
    bounds = segments.contiguous() if segments is not None and S > 1 else None
    acc = torch.promote_types(params.dtype, torch.float32)
    partials = params.new_empty((count, slots), dtype=acc)
    arguments = (params, base, bounds, partials, S, slots, P, stride(params, 0))
    options = {
        "N": N,
        "COUNT": launch.held,
        "STEPS": search_steps(S),
        "BLOCK": launch.block,
        "LANES": launch.lanes,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
    }
    total_arguments = (partials, bounds, totals, count, count, S, slots)
    total_options = {"BLOCK": launch.block, "CHUNK": CHUNK, "num_warps": 8, "maxnreg": REGISTERS}
    return [
        Launch(gram_partial_kernel, slots * groups**2, arguments, options),
        Launch(blend_weight_grad_total_kernel, S * count, total_arguments, total_options),
    ]

"""magnitude_sums on Triton: sums of |params - base|, of all elements and of those a rule keeps.

Two stages in a fixed order, without atomics: partial sums over pieces of columns with slots as in
blend_weight_grad, and their totals per segment, in fp64.
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
from ._rules import task_vector
from ._segments import find_segment, search_steps
from .blend_weight_grad import CHUNK, blend_weight_grad_total_kernel


@triton.jit(do_not_specialize=["S", "slots", "columns", "start", "seed"])
def magnitude_sums_partial_kernel(
    params_ptr, base_ptr, bounds_ptr, numbers_ptr, places_ptr, partials_ptr,
    S: tl.int64, slots: tl.int64, columns: tl.int64, row_stride, start: tl.int64, seed: tl.int64,
    N: tl.constexpr, RULE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """partials[i, slot], partials[N + i, slot] = sums over a piece's columns of |d_i|, and of those
    that are kept.

    params (N, P), any row stride, column stride 1, fp32, bf16, fp16 or fp64; base (P,) likewise or
    None; bounds (S + 1,) int64, not read when S = 1; numbers (5, N), places (4, N) and RULE as
    merge_task_vectors has them, without scales; partials (2 N, slots) contiguous, fp32 (fp64 for
    fp64 params), the type of the sums over at most BLOCK columns, LANES at a time. Column p's place
    is start + p. Moves (N + 1) P values, base from cache.
    """
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    # The interpreter gives an annotated argument the smallest type that holds it.
    P = columns.to(tl.int64)
    slot = tl.program_id(0).to(tl.int64) // N
    expert = tl.program_id(0).to(tl.int64) % N
    segment = find_segment(bounds_ptr, slot, S, STEPS, BLOCK)
    block = (slot - segment) * BLOCK
    begin = block
    end = tl.minimum(block + BLOCK, P)
    if STEPS > 0:
        begin = tl.maximum(tl.maximum(block, tl.load(bounds_ptr + segment)), 0)
        end = tl.minimum(end, tl.load(bounds_ptr + segment + 1))
    before = tl.zeros((LANES,), ACC)
    after = tl.zeros((LANES,), ACC)
    first = block + (begin - block) // LANES * LANES
    while first < end:
        p = first + tl.arange(0, LANES)
        mask = (p >= begin) & (p < end)
        x = tl.load(params_ptr + expert * row_stride + p, mask=mask, other=0.0)
        origin = tl.zeros((LANES,), ACC)
        if base_ptr is not None:
            origin = tl.load(base_ptr + p, mask=mask, other=0.0).to(ACC)
        d, dropped = task_vector(
            x, origin, expert, numbers_ptr, places_ptr, p, start.to(tl.int64), seed.to(tl.int64),
            N, RULE,
        )  # fmt: skip
        before += tl.abs(d)
        after += tl.where(dropped, 0.0, tl.abs(d))
        first += LANES
    tl.store(partials_ptr + expert * slots + slot, tl.sum(before))
    tl.store(partials_ptr + (N + expert) * slots + slot, tl.sum(after))


def why_not(
    params: torch.Tensor,
    base: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
    *_: object,
) -> str | None:
    """Why Triton cannot take this call, or None."""
    if base is not None and base.shape[0] > 1 and base.stride(0) != 1:
        return f"base is not contiguous (stride {base.stride(0)})"
    return why_not_arena(params, segments)


def magnitude_sums(
    sums: torch.Tensor,
    params: torch.Tensor,
    base: torch.Tensor | None,
    segments: torch.Tensor | None,
    numbers: torch.Tensor,
    places: torch.Tensor | None,
    rule: int,
    seed: int,
    start: int,
    launch: Config | None = None,
) -> None:
    """Write the sums (S, 2, N); arguments as the native twin's.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("magnitude_sums", why_not(params, base, segments))
    if sums.shape[0] == 0 or params.shape[1] == 0:
        sums.zero_()
        return
    launch = launch or config("magnitude_sums", params.dtype, params.shape[0], 1)
    tables = (numbers, places, rule, seed, start)
    run(params, launches(sums, params, base, segments, *tables, launch))


def launches(
    sums: torch.Tensor,
    params: torch.Tensor,
    base: torch.Tensor | None,
    segments: torch.Tensor | None,
    numbers: torch.Tensor,
    places: torch.Tensor | None,
    rule: int,
    seed: int,
    start: int,
    launch: Config,
) -> list[Launch]:
    """What :func:`magnitude_sums` launches for this call, in order."""
    (N, P), S = params.shape, sums.shape[0]
    slots, count = -(-P // launch.block) + S - 1, 2 * N
    bounds = segments.contiguous() if segments is not None and S > 1 else None
    partials = numbers.new_empty((count, slots))
    arguments = (params, base, bounds, numbers, places, partials, S, slots, P, stride(params, 0))
    options = {
        "N": N,
        "RULE": rule,
        "STEPS": search_steps(S),
        "BLOCK": launch.block,
        "LANES": launch.lanes,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
    }
    totals = (partials, bounds, sums, count, count, S, slots)
    total_options = {"BLOCK": launch.block, "CHUNK": CHUNK, "num_warps": 8, "maxnreg": REGISTERS}
    return [
        Launch(magnitude_sums_partial_kernel, slots * N, (*arguments, start, seed), options),
        Launch(blend_weight_grad_total_kernel, S * count, totals, total_options),
    ]

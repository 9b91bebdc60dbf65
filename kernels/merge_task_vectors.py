"""merge_task_vectors on Triton: N task vectors bounded, drawn, elected and combined in one pass."""

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
from ._rows import load_experts
from ._rules import task_vector


@triton.jit
def _vote(
    total, held, first, base, numbers_ptr, places_ptr, lanes, start, seed, N: tl.constexpr,
    HELD: tl.constexpr, RULE: tl.constexpr, ELECT: tl.constexpr,
):  # fmt: skip
    """``total`` with the votes of the held experts."""
    for j in tl.static_range(HELD):
        v, dropped = task_vector(
            held[j], base, first + j, numbers_ptr, places_ptr, lanes, start, seed, N, RULE
        )
        weight = tl.load(numbers_ptr + first + j)
        if ELECT == 1:
            vote = weight * v
        elif ELECT == 2:
            vote = v
        else:
            if ELECT == 4:
                weight = tl.full((), 1.0, base.dtype)
            vote = tl.where(v > 0, weight, tl.where(v < 0, -weight, 0.0))
        total = total + tl.where(dropped, 0.0, vote)
    return total


@triton.jit
def _take(
    q, divisor, total, held, first, base, numbers_ptr, places_ptr, lanes, start, seed,
    N: tl.constexpr, HELD: tl.constexpr, RULE: tl.constexpr, ELECT: tl.constexpr,
    ZERO: tl.constexpr, DIVIDE: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """``q`` and ``divisor`` with those of the held experts that agree with ``total``."""
    for j in tl.static_range(HELD):
        v, dropped = task_vector(
            held[j], base, first + j, numbers_ptr, places_ptr, lanes, start, seed, N, RULE
        )
        weight = tl.load(numbers_ptr + first + j)
        t = weight * v
        if ELECT > 0:
            on = v
            if ELECT % 2 == 1:
                on = t
            if ZERO < 0:
                opposed = tl.where(total > 0, on <= 0, on >= 0)
            else:
                opposed = tl.where(total < 0, on >= 0, on <= 0)
            if ZERO == 0:
                opposed = opposed | ((total == 0) & (on == on))
            dropped = dropped | opposed
        t = tl.where(dropped, 0.0, t)
        if LARGEST:
            q = tl.where((tl.abs(t) > tl.abs(q)) | (t != t), t, q)
        else:
            q = q + t
        if DIVIDE == 1:
            divisor = divisor + tl.where(dropped, 0.0, weight)
        elif DIVIDE == 2:
            divisor = divisor + tl.where(dropped, 0.0, 1.0)
    return q, divisor


@triton.jit
def _quotient(q, divisor):
    """Rounded to nearest, which ``/`` is not in fp32."""
    if q.dtype == tl.float64:
        return q / divisor
    else:
        return tl.div_rn(q, divisor)


@triton.jit
def _divided(
    q, divisor, numbers_ptr, N: tl.constexpr, ELECT: tl.constexpr, DIVIDE: tl.constexpr
):  # fmt: skip
    if (DIVIDE == 1) & (ELECT == 0):  # all experts' weights, kept or not
        total = tl.full((), 0.0, q.dtype)
        for i in tl.static_range(N):
            total = total + tl.load(numbers_ptr + i)
        small = tl.abs(total) < tl.full((), 1e-8, total.dtype)
        return _quotient(q, tl.zeros_like(q) + tl.where(small, 1.0, total))
    elif DIVIDE > 0:
        return _quotient(q, tl.where(divisor == 0, 1.0, divisor))
    else:
        return q


@triton.jit
def _merge_block(
    params_ptr, base_ptr, out_ptr, numbers_ptr, places_ptr, mask, row_stride, start, seed, experts,
    N: tl.constexpr, HELD: tl.constexpr, RULE: tl.constexpr, ELECT: tl.constexpr,
    ZERO: tl.constexpr, DIVIDE: tl.constexpr, LARGEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of columns, where the pointers point; ``start`` is the first one's place.

    ``experts`` is N, hidden from the compiler where it would unroll the turns.
    """
    ACC: tl.constexpr = numbers_ptr.dtype.element_ty
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    held = load_experts(params_ptr, row_stride, lanes, mask, HELD)
    base = tl.zeros((BLOCK,), ACC)
    if base_ptr is not None:
        base = tl.load(base_ptr + lanes, mask=mask).to(ACC)
    total = tl.zeros((BLOCK,), ACC)
    q = tl.zeros((BLOCK,), ACC)
    divisor = tl.zeros((BLOCK,), ACC)
    if HELD == N:
        if ELECT > 0:
            total = _vote(
                total, held, 0, base, numbers_ptr, places_ptr, lanes, start, seed,
                N, HELD, RULE, ELECT,
            )  # fmt: skip
        q, divisor = _take(
            q, divisor, total, held, 0, base, numbers_ptr, places_ptr, lanes, start, seed,
            N, HELD, RULE, ELECT, ZERO, DIVIDE, LARGEST,
        )  # fmt: skip
    else:
        first = experts * 0
        if ELECT > 0:
            while first < experts:
                held = load_experts(params_ptr + first * row_stride, row_stride, lanes, mask, HELD)
                total = _vote(
                    total, held, first, base, numbers_ptr, places_ptr, lanes, start, seed,
                    N, HELD, RULE, ELECT,
                )  # fmt: skip
                first += HELD
        first = experts * 0
        while first < experts:
            held = load_experts(params_ptr + first * row_stride, row_stride, lanes, mask, HELD)
            q, divisor = _take(
                q, divisor, total, held, first, base, numbers_ptr, places_ptr, lanes, start, seed,
                N, HELD, RULE, ELECT, ZERO, DIVIDE, LARGEST,
            )  # fmt: skip
            first += HELD
    q = _divided(q, divisor, numbers_ptr, N, ELECT, DIVIDE)
    theta = base + tl.load(numbers_ptr + 4 * N) * q
    if not OUT.is_fp64():  # via fp32 to the 16-bit types, as PyTorch converts fp64
        theta = theta.to(tl.float32)
    tl.store(out_ptr + lanes, theta.to(OUT), mask=mask)


@triton.jit(do_not_specialize=["column_units", "stride_units", "start", "seed", "experts"])
def merge_task_vectors_kernel(
    params_ptr, base_ptr, out_ptr, numbers_ptr, places_ptr, column_units: tl.int64,
    stride_units: tl.int64, start: tl.int64, seed: tl.int64, experts: tl.int64,
    N: tl.constexpr, HELD: tl.constexpr, RULE: tl.constexpr, ELECT: tl.constexpr,
    ZERO: tl.constexpr, DIVIDE: tl.constexpr, LARGEST: tl.constexpr,
    COLUMN_UNIT: tl.constexpr, STRIDE_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """theta[p] = base[p] + lam q[p], as neulig_fast/ops/merge_task_vectors.py has it.

    params (N, P), any row stride, column stride 1, fp32, bf16, fp16 or fp64; base (P,) of their
    type or None; out (P,) in any of these. numbers (5, N), fp32 (fp64 for fp64 params): weights,
    scales, lower, upper, lam; places (4, N) int64: lower_cut, upper_cut, thresholds, streams; both
    contiguous. RULE says which count: 1 lower, 2 upper, 4 draws, 8 scales. ELECT, DIVIDE and
    LARGEST are the places of the op's words in their lists. Column p's place is start + p. P and
    the row stride come as multiples of the UNITs.
    Accumulates in numbers' type: multiply, then add, in expert order; one rounding at the end.
    Moves (N + 1) * P values in, once if HELD = N, and P out.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    P = column_units.to(tl.int64) * COLUMN_UNIT
    row_stride = stride_units.to(tl.int64) * STRIDE_UNIT
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    place = start.to(tl.int64) + begin
    seed = seed.to(tl.int64)
    origin = base_ptr
    if base_ptr is not None:
        origin = base_ptr + begin
    mask = tl.arange(0, BLOCK) < P - begin
    _merge_block(
        params_ptr + begin, origin, out_ptr + begin, numbers_ptr, places_ptr, mask, row_stride,
        place, seed, experts, N, HELD, RULE, ELECT, ZERO, DIVIDE, LARGEST, BLOCK,
    )  # fmt: skip


def why_not(
    params: torch.Tensor, weights: torch.Tensor, base: torch.Tensor | None = None, *_: object
) -> str | None:
    """Why Triton cannot take this call, or None."""
    if base is not None and base.shape[0] > 1 and base.stride(0) != 1:
        return f"base is not contiguous (stride {base.stride(0)})"
    return why_not_arena(params, None)


def merge_task_vectors(
    out: torch.Tensor,
    params: torch.Tensor,
    base: torch.Tensor | None,
    numbers: torch.Tensor,
    places: torch.Tensor | None,
    *options: int,
    launch: Config | None = None,
) -> None:
    """Write theta into ``out`` (P,), contiguous; arguments as the native twin's.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("merge_task_vectors", why_not(params, numbers, base))
    if out.numel() > 0:
        launch = launch or config("merge_task_vectors", params.dtype, params.shape[0], 1)
        run(params, launches(out, params, base, numbers, places, *options, launch=launch))


def launches(
    out: torch.Tensor,
    params: torch.Tensor,
    base: torch.Tensor | None,
    numbers: torch.Tensor,
    places: torch.Tensor | None,
    rule: int,
    seed: int,
    start: int,
    elect: int,
    zero_sign: int,
    divide: int,
    combine: int,
    launch: Config,
) -> list[Launch]:
    """What :func:`merge_task_vectors` launches for this call."""
    N, P = params.shape
    row_stride = params.stride(0) if N > 1 else 0
    column_unit, stride_unit = alignment(P), alignment(row_stride)
    units = P // column_unit, row_stride // stride_unit
    arguments = (params, base, out, numbers, places, *units, start, seed, N)
    options = {
        "N": N,
        "HELD": launch.held,
        "RULE": rule,
        "ELECT": elect,
        "ZERO": zero_sign,
        "DIVIDE": divide,
        "LARGEST": combine == 1,
        "COLUMN_UNIT": column_unit,
        "STRIDE_UNIT": stride_unit,
        "BLOCK": launch.block,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
        "enable_fp_fusion": False,  # multiply, then add
    }
    return [Launch(merge_task_vectors_kernel, -(-P // launch.block), arguments, options)]

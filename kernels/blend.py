"""blend on Triton: theta[k, p] = sum_i w[k, s(p), i] * params[i, p]."""

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


@triton.jit
def _load_experts(first_ptr, row_stride, lanes, mask, COUNT: tl.constexpr):
    """COUNT rows from ``first_ptr`` on, as stored: every load before any use."""
    values = (tl.load(first_ptr + lanes, mask=mask),)
    for j in tl.static_range(1, COUNT):
        values += (tl.load(first_ptr + j * row_stride + lanes, mask=mask),)
    return values


@triton.jit
def _weighted_sum(
    held, w, params_ptr, row_stride, lanes, mask, N: tl.constexpr, HELD: tl.constexpr
):
    """w[0] * x[0] + w[1] * x[1] + ..., in order: the held experts, then the others by eights."""
    acc = tl.load(w) * held[0].to(w.dtype.element_ty)
    for j in tl.static_range(1, HELD):
        acc = acc + tl.load(w + j) * held[j].to(w.dtype.element_ty)
    for first in range(HELD, N, 8):
        streamed = _load_experts(params_ptr + first * row_stride, row_stride, lanes, mask, 8)
        for j in tl.static_range(8):
            acc = acc + tl.load(w + first + j) * streamed[j].to(w.dtype.element_ty)
    return acc


@triton.jit
def _blend_block(
    weights_ptr, params_ptr, bounds_ptr, out_ptr, start, count, mask, K, S, P, row_stride,
    N: tl.constexpr, HELD: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All outputs of ``count`` columns from ``start`` on, where params_ptr and out_ptr point."""
    lanes = tl.arange(0, BLOCK)
    # Issued before the search for the segment, whose latency then hides behind theirs.
    held = _load_experts(params_ptr, row_stride, lanes, mask, HELD)
    first_segment = find_segment(bounds_ptr, start, S, STEPS, 0)
    last_segment = find_segment(bounds_ptr, start + count - 1, S, STEPS, 0)
    k = K * 0
    while k < K:  # the interpreter's range() refuses kernel arguments since numpy 2.4
        w = weights_ptr + (k * S + first_segment) * N
        acc = _weighted_sum(held, w, params_ptr, row_stride, lanes, mask, N, HELD)
        if STEPS > 0:
            segment = first_segment + 1
            while segment <= last_segment:  # skipped by blocks inside one segment: nearly all
                w = weights_ptr + (k * S + segment) * N
                other = _weighted_sum(held, w, params_ptr, row_stride, lanes, mask, N, HELD)
                begin = tl.load(bounds_ptr + segment) - start
                acc = tl.where(lanes >= begin.to(tl.int32), other, acc)
                segment += 1
        tl.store(out_ptr + k * P + lanes, acc.to(out_ptr.dtype.element_ty), mask=mask)
        k += 1


@triton.jit(do_not_specialize=["K", "S", "column_units", "stride_units"])
def blend_kernel(
    weights_ptr, params_ptr, bounds_ptr, out_ptr,
    K: tl.int64, S: tl.int64, column_units: tl.int64, stride_units: tl.int64,
    N: tl.constexpr, HELD: tl.constexpr, STEPS: tl.constexpr,
    COLUMN_UNIT: tl.constexpr, STRIDE_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[k, p] = sum_i weights[k, s(p), i] * params[i, p], s(p) the segment of column p.

    weights (K, S, N) contiguous, fp32 (fp64 for fp64 params); params (N, P), any row stride, column
    stride 1, fp32, bf16, fp16 or fp64; bounds (S+1,) int64, not read when S = 1; out (K, P)
    contiguous, params' type. P and the row stride come as multiples of COLUMN_UNIT and STRIDE_UNIT
    elements, which is how the compiler learns that wide accesses stay aligned.
    Accumulates in weights' type: multiply, then add, in expert order; one rounding at the end.
    Moves (N + K) * P * itemsize bytes: each expert is read once if HELD = N or K = 1.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    P = column_units.to(tl.int64) * COLUMN_UNIT
    row_stride = stride_units.to(tl.int64) * STRIDE_UNIT
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # Where P is a multiple of 16, masks never cut a vector and one masked path serves every block.
    if (COLUMN_UNIT < 16) & (start + BLOCK <= P):
        _blend_block(
            weights_ptr, params_ptr + start, bounds_ptr, out_ptr + start, start, BLOCK, None,
            K, S, P, row_stride, N, HELD, STEPS, BLOCK,
        )  # fmt: skip
    else:
        count = tl.minimum(P - start, BLOCK)
        mask = tl.arange(0, BLOCK) < (P - start)
        _blend_block(
            weights_ptr, params_ptr + start, bounds_ptr, out_ptr + start, start, count, mask,
            K, S, P, row_stride, N, HELD, STEPS, BLOCK,
        )  # fmt: skip


def why_not(
    weights: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return why_not_arena(params, segments)


def blend(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None = None,
    launch: Config | None = None,
) -> torch.Tensor:
    """theta (P,) or (K, P) in params' dtype; arguments as the op's, weights in the acc dtype.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("blend", why_not(weights, params, segments))
    leading = weights.shape[: -1 if segments is None else -2]
    out = params.new_empty((*leading, params.shape[1]))
    if out.numel() > 0:
        outputs = out.numel() // params.shape[1]
        launch = launch or config("blend", params.dtype, params.shape[0], outputs)
        run(params, launches(weights, params, segments, out, launch))
    return out


def launches(
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None,
    out: torch.Tensor,
    launch: Config,
) -> list[Launch]:
    """What :func:`blend` launches for this call."""
    (N, P), S = params.shape, 1 if segments is None else segments.numel() - 1
    row_stride = params.stride(0) if N > 1 else 0
    column_unit, stride_unit = alignment(P), alignment(row_stride)
    bounds = segments.contiguous() if segments is not None and S > 1 else None
    units = (P // column_unit, row_stride // stride_unit)
    options = {
        "N": N,
        "HELD": launch.held,
        "STEPS": search_steps(S),
        "COLUMN_UNIT": column_unit,
        "STRIDE_UNIT": stride_unit,
        "BLOCK": launch.block,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
        "enable_fp_fusion": False,  # multiply, then add
    }
    arguments = (weights.contiguous(), params, bounds, out, out.numel() // P, S, *units)
    return [Launch(blend_kernel, -(-P // launch.block), arguments, options)]

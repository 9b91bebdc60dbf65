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
from ._rounding import (
    FP8,
    NARROW,
    as_stored,
    encode,
    encode_randomly,
    random_words,
    widen,
)
from ._rows import load_experts
from ._segments import find_segment, search_steps


@triton.jit
def _weighted_sum(
    held, w, params_ptr, row_stride, lanes, mask,
    N: tl.constexpr, HELD: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """w[0] * x[0] + w[1] * x[1] + ..., in order: the held experts, then the others by eights."""
    ACC: tl.constexpr = w.dtype.element_ty
    acc = tl.load(w) * widen(held[0], ACC, IN)
    for j in tl.static_range(1, HELD):
        acc = acc + tl.load(w + j) * widen(held[j], ACC, IN)
    for first in range(HELD, N, 8):
        streamed = load_experts(params_ptr + first * row_stride, row_stride, lanes, mask, 8)
        for j in tl.static_range(8):
            acc = acc + tl.load(w + first + j) * widen(streamed[j], ACC, IN)
    return acc


@triton.jit
def _places(bounds_ptr, start, end, first_segment, S, lanes, STEPS: tl.constexpr):
    """Of every lane its segment, and its column counted from that segment's start."""
    column = start + lanes
    owner = tl.zeros_like(column) + first_segment
    if STEPS > 0:
        column -= tl.load(bounds_ptr + first_segment)
        segment = first_segment + 1
        begin = tl.load(bounds_ptr + segment)
        while (segment < S) & (begin < end):
            inside = start + lanes >= begin
            column = tl.where(inside, start + lanes - begin, column)
            owner = tl.where(inside, segment, owner)
            segment += 1
            begin = tl.load(bounds_ptr + segment)
    return column, owner


@triton.jit
def _store(out_ptr, acc, mask, seed, k, column, owner, OUT: tl.constexpr, SEEDED: tl.constexpr):
    """Round once and store. OUT: a name of NARROW, by way of fp32, or ""."""
    STORED: tl.constexpr = out_ptr.dtype.element_ty
    if OUT == "":
        tl.store(out_ptr, acc.to(STORED), mask=mask)
    elif SEEDED:
        random = random_words(seed, column, owner, k)
        tl.store(out_ptr, encode_randomly(acc.to(tl.float32), random, OUT).to(STORED), mask=mask)
    elif (OUT == "bf16") | (OUT == "fp16"):
        tl.store(out_ptr, acc.to(tl.float32).to(STORED), mask=mask)
    else:
        tl.store(out_ptr, encode(acc.to(tl.float32), OUT).to(STORED), mask=mask)


@triton.jit
def _blend_block(
    weights_ptr, params_ptr, bounds_ptr, out_ptr, start, count, mask, K, S, row_stride, out_stride,
    seed, N: tl.constexpr, HELD: tl.constexpr, STEPS: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, SEEDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All outputs of ``count`` columns from ``start`` on, where params_ptr and out_ptr point."""
    lanes = tl.arange(0, BLOCK)
    end = start + count
    # Issued before the search for the segment, whose latency then hides behind theirs.
    held = load_experts(params_ptr, row_stride, lanes, mask, HELD)
    first_segment = find_segment(bounds_ptr, start, S, STEPS, 0)
    column, owner = lanes, lanes
    if SEEDED:
        column, owner = _places(bounds_ptr, start, end, first_segment, S, lanes, STEPS)
    k = K * 0
    while k < K:  # the interpreter's range() refuses kernel arguments since numpy 2.4
        w = weights_ptr + (k * S + first_segment) * N
        acc = _weighted_sum(held, w, params_ptr, row_stride, lanes, mask, N, HELD, IN)
        if STEPS > 0:
            segment = first_segment + 1
            begin = tl.load(bounds_ptr + segment)
            while (segment < S) & (begin < end):  # blocks inside one segment, nearly all, skip this
                w = weights_ptr + (k * S + segment) * N
                other = _weighted_sum(held, w, params_ptr, row_stride, lanes, mask, N, HELD, IN)
                acc = tl.where(lanes >= (begin - start).to(tl.int32), other, acc)
                segment += 1
                begin = tl.load(bounds_ptr + segment)
        _store(out_ptr + k * out_stride + lanes, acc, mask, seed, k, column, owner, OUT, SEEDED)
        k += 1


@triton.jit(do_not_specialize=["K", "S", "column_units", "stride_units", "out_units", "seed"])
def blend_kernel(
    weights_ptr, params_ptr, bounds_ptr, out_ptr,
    K: tl.int64, S: tl.int64, column_units: tl.int64, stride_units: tl.int64, out_units: tl.int64,
    seed: tl.int64, N: tl.constexpr, HELD: tl.constexpr, STEPS: tl.constexpr, IN: tl.constexpr,
    OUT: tl.constexpr, SEEDED: tl.constexpr, COLUMN_UNIT: tl.constexpr, STRIDE_UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[k, p] = sum_i weights[k, s(p), i] * params[i, p], s(p) the segment of column p.

    weights (K, S, N) contiguous, fp32 (fp64 for fp64 params); params (N, P) and out (K, P), any row
    stride, column stride 1, fp32, bf16, fp16, fp64 or bytes of the fp8 types IN and OUT; bounds
    (S+1,) int64, not read when S = 1. OUT also names bf16 and fp16, which are integers if SEEDED.
    P and the row strides come as multiples of the UNITs, which is how the compiler learns that wide
    accesses stay aligned.
    Accumulates in weights' type: multiply, then add, in expert order; one rounding at the end.
    Moves N * P values of params, each once if HELD = N or K = 1, and K * P of out.
    """
    # The interpreter gives an annotated argument the smallest type that holds it.
    P = column_units.to(tl.int64) * COLUMN_UNIT
    row_stride = stride_units.to(tl.int64) * STRIDE_UNIT
    out_stride = out_units.to(tl.int64) * OUT_UNIT
    seed = seed.to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK
    # Where P is a multiple of 16, masks never cut a vector and one masked path serves every block.
    if (COLUMN_UNIT < 16) & (start + BLOCK <= P):
        _blend_block(
            weights_ptr, params_ptr + start, bounds_ptr, out_ptr + start, start, BLOCK, None,
            K, S, row_stride, out_stride, seed, N, HELD, STEPS, IN, OUT, SEEDED, BLOCK,
        )  # fmt: skip
    else:
        count = tl.minimum(P - start, BLOCK)
        mask = tl.arange(0, BLOCK) < (P - start)
        _blend_block(
            weights_ptr, params_ptr + start, bounds_ptr, out_ptr + start, start, count, mask,
            K, S, row_stride, out_stride, seed, N, HELD, STEPS, IN, OUT, SEEDED, BLOCK,
        )  # fmt: skip


def why_not(
    weights: torch.Tensor, params: torch.Tensor, segments: torch.Tensor | None = None, *_: object
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return why_not_arena(as_stored(params), segments, bytes_=params.dtype in FP8)


def blend(
    out: torch.Tensor,
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None = None,
    seed: int | None = None,
    launch: Config | None = None,
) -> None:
    """Write theta into ``out`` (P,) or (K, P), contiguous columns; weights are in the acc dtype.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("blend", why_not(weights, params, segments))
    if out.numel() > 0:
        outputs = out.numel() // params.shape[1]
        if launch is None:
            options = {"seeded": seed is not None}
            launch = config("blend", params.dtype, params.shape[0], outputs, **options)
        run(params, launches(out, weights, params, segments, seed, launch))


def launches(
    out: torch.Tensor,
    weights: torch.Tensor,
    params: torch.Tensor,
    segments: torch.Tensor | None,
    seed: int | None,
    launch: Config,
) -> list[Launch]:
    """What :func:`blend` launches for this call."""
    (N, P), S = params.shape, 1 if segments is None else segments.numel() - 1
    K = out.numel() // P
    strides = P, params.stride(0) if N > 1 else 0, out.stride(0) if K > 1 else 0
    units = [alignment(stride) for stride in strides]
    bounds = segments.contiguous() if segments is not None and S > 1 else None
    options = {
        "N": N,
        "HELD": launch.held,
        "STEPS": search_steps(S),
        "IN": FP8.get(params.dtype, ""),
        "OUT": NARROW.get(out.dtype, ""),
        "SEEDED": seed is not None,
        **dict(zip(("COLUMN_UNIT", "STRIDE_UNIT", "OUT_UNIT"), units, strict=True)),
        "BLOCK": launch.block,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
        "enable_fp_fusion": False,  # multiply, then add
    }
    stored = as_stored(out, codes=seed is not None)
    counts = (stride // unit for stride, unit in zip(strides, units, strict=True))
    arguments = (weights.contiguous(), as_stored(params), bounds, stored, K, S, *counts, seed or 0)
    return [Launch(blend_kernel, -(-P // launch.block), arguments, options)]

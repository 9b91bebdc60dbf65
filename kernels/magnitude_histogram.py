"""magnitude_histogram on Triton: how often the values of a digit occur in magnitudes."""

from __future__ import annotations

import torch

from ..ops._digits import BINS, DIGITS, Digit
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
from ._magnitudes import load_keys


@triton.jit(do_not_specialize=["parts"])
def magnitude_histogram_kernel(
    params_ptr, base_ptr, prefix_ptr, counts_ptr, P, row_stride, parts,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Adds the counts of a part of a row to those of its expert.

    params (N, P), any row stride, column stride 1, fp32, bf16, fp16 or fp64; base (P,) likewise or
    None; prefix (N,) int64; counts (N, BINS) int64, added to by integer atomics: the sums do not
    depend on their order. BLOCK columns a program, LANES at a time. Moves (N + 1) P values.
    """
    program = tl.program_id(0).to(tl.int64)
    expert = program // parts
    begin = program % parts * BLOCK
    prefix = tl.load(prefix_ptr + expert)
    total = tl.zeros((BINS,), tl.int32)
    for step in range(BLOCK // LANES):
        columns = begin + step * LANES + tl.arange(0, LANES)
        keys = load_keys(params_ptr, base_ptr, expert, columns, P, row_stride)
        wanted = (keys >= 0) & ((keys >> (SHIFT + WIDTH)).to(tl.int64) == prefix)
        digits = ((keys >> SHIFT) & ((1 << WIDTH) - 1)).to(tl.int32)
        total += tl.histogram(digits, BINS, mask=wanted)
    bins = tl.arange(0, BINS)
    counts_ptr += expert * BINS
    tl.atomic_add(counts_ptr + bins, total.to(tl.int64), mask=total > 0, sem="relaxed")


def why_not(
    params: torch.Tensor, prefix: torch.Tensor, digit: int, base: torch.Tensor | None = None
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return why_not_magnitudes(params, base)


def why_not_magnitudes(params: torch.Tensor, base: torch.Tensor | None) -> str | None:
    """Why a kernel cannot read ``params`` (N, P) and ``base`` (P,); None when it can."""
    if (reason := why_not_arena(params, None)) is not None:
        return reason
    if base is not None and base.shape[0] > 1 and base.stride(0) != 1:
        return f"base's columns are not contiguous (stride {base.stride(0)})"
    return None


def magnitude_histogram(
    params: torch.Tensor,
    prefix: torch.Tensor,
    digit: int,
    base: torch.Tensor | None = None,
    launch: Config | None = None,
) -> torch.Tensor:
    """counts (N, 2048) int64; arguments as the op's, prefix contiguous.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("magnitude_histogram", why_not(params, prefix, digit, base))
    launch = launch or config("magnitude_histogram", params.dtype, params.shape[0], 1)
    counts = params.new_zeros((params.shape[0], BINS), dtype=torch.int64)
    if params.shape[1] > 0:
        run(params, launches(params, prefix, digits(params.dtype)[digit], base, counts, launch))
    return counts


def digits(dtype: torch.dtype) -> tuple[Digit, ...]:
    """The digits of magnitudes of parameters of this type."""
    return DIGITS[64 if dtype == torch.float64 else 32]


def launches(
    params: torch.Tensor,
    prefix: torch.Tensor,
    digit: Digit,
    base: torch.Tensor | None,
    counts: torch.Tensor,
    launch: Config,
) -> list[Launch]:
    """What :func:`magnitude_histogram` launches for this call."""
    N, P = params.shape
    parts = -(-P // launch.block)
    arguments = (params, base, prefix, counts, P, stride(params, 0), parts)
    options = {
        "SHIFT": digit.shift,
        "WIDTH": digit.width,
        "BINS": BINS,
        "BLOCK": launch.block,
        "LANES": launch.lanes,
        "num_warps": launch.num_warps,
        "maxnreg": REGISTERS,
    }
    return [Launch(magnitude_histogram_kernel, N * parts, arguments, options)]

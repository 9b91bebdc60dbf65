"""magnitude_select on Triton: digits of the wanted magnitude, one pass each, then its last tie."""

from __future__ import annotations

import torch

from ..ops._digits import BINS
from . import magnitude_histogram as histogram
from ._launch import REGISTERS, Config, Launch, config, require, run, stride, tl, triton
from ._magnitudes import load_keys


@triton.jit
def magnitude_digit_kernel(
    counts_ptr, prefix_ptr, rank_ptr, WIDTH: tl.constexpr, BINS: tl.constexpr, FIRST: tl.constexpr
):
    """Appends the wanted magnitude's digit to its prefix; its rank becomes that among those left.

    counts (N, BINS) int64 of this digit; prefix and rank (N,) int64. One program an expert. FIRST:
    the uppermost digit, before which prefix is 0; it becomes -1 where every number is wanted.
    """
    expert = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    counts = tl.load(counts_ptr + expert * BINS + bins)
    prefix = tl.load(prefix_ptr + expert)
    rank = tl.load(rank_ptr + expert)
    total = tl.sum(counts)
    if FIRST:
        prefix = tl.where(rank >= total, -1, prefix)
    from_here = total - tl.cumsum(counts, 0) + counts  # of this value of the digit and above
    digit = tl.sum((from_here >= rank).to(tl.int64)) - 1
    above = tl.sum(tl.where(bins > digit, counts, 0))
    tl.store(prefix_ptr + expert, tl.where(prefix < 0, prefix, (prefix << WIDTH) | digit))
    tl.store(rank_ptr + expert, rank - above)


@triton.jit(do_not_specialize=["blocks"])
def magnitude_ties_kernel(
    params_ptr, base_ptr, prefix_ptr, ties_ptr, P, row_stride, blocks, BLOCK: tl.constexpr
):
    """How many magnitudes of a block are the wanted one: ties (N, blocks) int32.

    params (N, P), any row stride, column stride 1; base (P,) or None; prefix (N,) int64, the bits
    of the wanted magnitude, or -1. Moves (N + 1) P values.
    """
    program = tl.program_id(0).to(tl.int64)
    expert = program // blocks
    columns = program % blocks * BLOCK + tl.arange(0, BLOCK)
    keys = load_keys(params_ptr, base_ptr, expert, columns, P, row_stride)
    wanted = (keys >= 0) & (keys.to(tl.int64) == tl.load(prefix_ptr + expert))
    tl.store(ties_ptr + program, tl.sum(wanted.to(tl.int32)))


@triton.jit(do_not_specialize=["blocks"])
def magnitude_cut_kernel(
    params_ptr, base_ptr, counts_ptr, prefix_ptr, rank_ptr, ties_ptr, thresholds_ptr, cuts_ptr,
    P, row_stride, blocks, BLOCK: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The threshold of an expert, and the place of its last tie, which is the rank-th.

    counts, prefix and rank (N,) int64; ties (N, blocks) int32; thresholds (N,) fp32 (fp64 for
    fp64), cuts (N,) int64. One program an expert, which takes LANES blocks' ties at a time.
    """
    expert = tl.program_id(0).to(tl.int64)
    key = tl.load(prefix_ptr + expert)
    rank = tl.load(rank_ptr + expert)
    if tl.load(counts_ptr + expert) <= 0:
        tl.store(thresholds_ptr + expert, float("inf"))
        tl.store(cuts_ptr + expert, 0)
    elif key < 0:
        tl.store(thresholds_ptr + expert, -1.0)
        tl.store(cuts_ptr + expert, 0)
    else:
        first = expert * 0
        seen = first  # ties of the blocks that were looked at
        before = first  # ties of the blocks before the one that has the last
        block = first
        while (first < blocks) & (seen < rank):
            at = first + tl.arange(0, LANES)
            ties = tl.load(ties_ptr + expert * blocks + at, mask=at < blocks, other=0)
            # Counts within LANES blocks fit 32 bits, and spare registers.
            wanted = tl.minimum(rank - seen, LANES * BLOCK + 1).to(tl.int32)
            short = (tl.cumsum(ties, 0) < wanted) & (at < blocks)
            block += tl.sum(short.to(tl.int32))
            before += tl.sum(tl.where(short, ties, 0))
            seen += tl.sum(ties)
            first += LANES
        columns = block * BLOCK + tl.arange(0, BLOCK)
        keys = load_keys(params_ptr, base_ptr, expert, columns, P, row_stride)
        passed = tl.cumsum((keys == key.to(keys.dtype)).to(tl.int32), 0)
        wanted = (rank - before).to(tl.int32)
        cut = block * BLOCK + tl.sum((passed < wanted).to(tl.int32)) + 1
        if thresholds_ptr.dtype.element_ty.is_fp64():
            tl.store(thresholds_ptr + expert, key.to(tl.float64, bitcast=True))
        else:
            tl.store(thresholds_ptr + expert, key.to(tl.int32).to(tl.float32, bitcast=True))
        tl.store(cuts_ptr + expert, cut)


def why_not(
    params: torch.Tensor, counts: torch.Tensor, base: torch.Tensor | None = None
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return histogram.why_not_magnitudes(params, base)


def magnitude_select(
    params: torch.Tensor,
    counts: torch.Tensor,
    base: torch.Tensor | None = None,
    launch: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """thresholds (N,) and cuts (N,); arguments as the op's, counts contiguous.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("magnitude_select", why_not(params, counts, base))
    acc, P = torch.promote_types(params.dtype, torch.float32), params.shape[1]
    thresholds = params.new_full((params.shape[0],), torch.inf, dtype=acc)
    cuts = torch.zeros_like(counts)
    if P > 0:
        run(params, launches(params, counts.clamp(0, P), base, thresholds, cuts, launch))
    return thresholds, cuts


def launches(
    params: torch.Tensor,
    counts: torch.Tensor,
    base: torch.Tensor | None,
    thresholds: torch.Tensor,
    cuts: torch.Tensor,
    launch: Config | None = None,
) -> list[Launch]:
    """What :func:`magnitude_select` launches for this call, in order; counts in 0 .. P."""
    N, P = params.shape
    passes = histogram.digits(params.dtype)
    launch = launch or config("magnitude_select", params.dtype, N, 1)
    counting = config("magnitude_histogram", params.dtype, N, 1)
    bins = params.new_zeros((len(passes), N, BINS), dtype=torch.int64)
    prefix, rank, blocks = torch.zeros_like(counts), counts.clone(), -(-P // launch.block)
    ties = params.new_empty((N, blocks), dtype=torch.int32)
    found, limits = [], {"num_warps": launch.num_warps, "maxnreg": REGISTERS}
    for i, digit in enumerate(passes):
        found += histogram.launches(params, prefix, digit, base, bins[i], counting)
        options = {"WIDTH": digit.width, "BINS": BINS, "FIRST": i == 0} | limits
        found.append(Launch(magnitude_digit_kernel, N, (bins[i], prefix, rank), options))
    size = P, stride(params, 0), blocks
    options = {"BLOCK": launch.block} | limits
    arguments = (params, base, prefix, ties, *size)
    found.append(Launch(magnitude_ties_kernel, N * blocks, arguments, options))
    arguments = (params, base, counts, prefix, rank, ties, thresholds, cuts, *size)
    options = options | {"LANES": launch.lanes}
    found.append(Launch(magnitude_cut_kernel, N, arguments, options))
    return found

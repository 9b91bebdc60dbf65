"""How the kernels of layers are cut into programs: the one place that chooses their tiles.

Tiles of products of more than 64 rows by tensor cores on large GPUs were the fastest without spills
of three to ten on an H100, at the sizes of ViTs (with some, 128 x 256 was faster). Other choices
are not measured: the largest that AOT compiling shows free of spills on every architecture, and
smaller ones for few rows or columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._launch import triton

# Bytes of a row, in the type of sums, that a program of a layer norm holds in registers; where it
# mixes gains, which takes as many again, half of that.
WIDEST_NORM = 65536


@dataclass(frozen=True)
class Tile:
    """``rows`` x ``columns`` of a product are a program's, summed ``depth`` terms at a time.

    ``group`` tiles of rows go over the columns side by side, so that the weights they share stay in
    cache. Loads run ``stages`` steps ahead.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    stages: int
    group: int = 8


def product_tile(
    dtype: torch.dtype,
    rows: int,
    columns: int,
    unit: int,
    *,
    tf32: bool,
    sums: int = 1,
    large: bool = False,
) -> Tile:
    """The tile for a product (rows, I) x (I, columns): a pure function of its arguments.

    ``unit``: values that one access may take. ``tf32``: whether fp32 is multiplied by tensor cores.
    Without, in fp64, and of rows that 16-byte accesses cut, tiles are smaller: factors, sums and
    addresses take more registers. ``sums``: how many of a tile are kept at once. ``large``: whether
    the GPU multiplies from shared memory, which leaves registers for more of them.
    """
    heavy = dtype == torch.float64 or (dtype == torch.float32 and not tf32)
    depth = 16 if heavy else 128 // dtype.itemsize  # the latter a cache line of every row
    most = 64 if heavy or unit * dtype.itemsize < 16 else 128
    tall = 16 if rows <= 16 else min(64 if rows <= 64 else 128, most)
    narrow = tall == 16 or columns <= 64 or (sums > 1 and not large)
    wide = 64 if narrow else most
    registers = sums * tall * wide * (dtype.itemsize // 4 if heavy else 1)
    return Tile(tall, wide, depth, num_warps=8 if registers > 64 * 64 else 4, stages=3)


# What a GPU multiplies while it moves a byte, in flops: the H200's data sheet, not a measurement.
_FLOPS_A_BYTE = {torch.bfloat16: 206, torch.float16: 206, torch.float32: 14, torch.float64: 14}
_FLOPS_A_BYTE_TF32 = 103
# Of merged weights at a time: little beside the experts, and enough samples to fill a GPU.
MERGED_BYTES = 128 << 20


def merges_first(dtype: torch.dtype, rows: int, experts: int, *, tf32: bool) -> bool:
    """Whether samples of ``rows`` rows, whose coefficients they share, are better multiplied with
    merged weights than by every expert.

    Merging writes every merged weight and reads it again, and saves 2 (N - 1) flops a row of it.
    """
    ratio = _FLOPS_A_BYTE_TF32 if tf32 and dtype == torch.float32 else _FLOPS_A_BYTE[dtype]
    return rows * (experts - 1) >= ratio * dtype.itemsize


def norm_rows(dtype: torch.dtype, width: int, rows: int) -> tuple[int, int]:
    """How many rows of ``width`` values, a power of 2, a program normalises, and its warps.

    ``rows``: how many there are with the same gain. 16 values a thread, half as many of fp64, by 8
    warps or, of one wide row, by 16, which may hold up to 128 registers a thread.
    """
    size = 2 if dtype == torch.float64 else 1  # registers of a value
    held = min(max(4096 // size // width, 1), triton.next_power_of_2(rows))
    return held, min(max(held * width * size // 512, 1), 16)


def moments_tile(dtype: torch.dtype, *, wide: bool) -> Tile:
    """The tile of cross_moments, which splits fp32 values in parts: a pure function of its
    arguments.

    ``wide``: whether the units of a row are read in 16-byte accesses. Others take more registers.
    """
    if dtype == torch.float64:
        return Tile(64, 64, 16, num_warps=8, stages=2)
    return Tile(128, 128, 32, num_warps=8, stages=3) if wide else Tile(64, 64, 32, 8, stages=3)


def row_slices(programs: int, steps: int) -> int:
    """Into how many slices of at least 8 of its steps a sum over rows is cut, so that with
    ``programs`` programs for each there are enough for a large GPU.

    No more than that: every slice writes results of its own.
    """
    return max(1, min(-(-256 // max(programs, 1)), steps // 8))

"""cross_moments on Triton: sum_t (x_t - a)(y_t - b)', and sums and squares of both factors."""

from __future__ import annotations

import torch

from ._gemm import add_dot
from ._launch import REGISTERS, Launch, missing, require, run, stride, tl, triton
from ._tiles import Tile, moments_tile, row_slices

BLOCK = 1024  # results that a program of the second kernel adds up


@triton.jit
def _load_shift(shift_ptr, unit, units, ACC: tl.constexpr):
    if shift_ptr is None:
        return tl.zeros(unit.shape, ACC)
    else:
        return tl.load(shift_ptr + unit, mask=unit < units, other=0.0)


@triton.jit
def _shifted(
    ptr, shift, step, B, T, unit, units, sample_stride, row_stride, unit_stride,
    ROWS: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """(ROWS, units of the tile) of one step: x - shift in its type; zeros outside the matrix."""
    per_sample = (T + ROWS - 1) // ROWS
    sample = step // per_sample
    t = step % per_sample * ROWS + tl.arange(0, ROWS)
    rows = ptr + sample * sample_stride + t[:, None] * row_stride
    inside = ((t < T) & (sample < B))[:, None]
    x = tl.load(
        rows + unit[None, :] * unit_stride, mask=inside & (unit < units)[None, :], other=0.0
    )
    if SHIFTED:
        return tl.where(inside, x.to(shift.dtype) - shift[None, :], 0.0)
    else:
        return x


@triton.jit
def _store_moments(
    ptr, shift_ptr, partials_ptr, begin, B, T, first, units,
    sample_stride, row_stride, unit_stride, STEPS: tl.constexpr, ROWS: tl.constexpr,
    UNITS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums of some units and, ``units`` numbers on, of their squares over STEPS steps."""
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    unit = first + tl.arange(0, UNITS)
    shift = _load_shift(shift_ptr, unit, units, ACC)
    sums = tl.zeros((ROWS, UNITS), ACC)
    squares = tl.zeros((ROWS, UNITS), ACC)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        x = _shifted(
            ptr, shift, begin + step, B, T, unit, units, sample_stride, row_stride, unit_stride,
            ROWS, shift_ptr is not None,
        ).to(ACC)  # fmt: skip
        sums += x
        squares += x * x
    tl.store(partials_ptr + unit, tl.sum(sums, 0), mask=unit < units)
    tl.store(partials_ptr + units + unit, tl.sum(squares, 0), mask=unit < units)


@triton.jit(do_not_specialize=["B"])
def cross_moments_partial_kernel(
    x_ptr, y_ptr, x_shift_ptr, y_shift_ptr, partials_ptr, B, T, X, Y, XY,
    x_sample, x_row, x_unit, y_sample, y_row, y_unit,
    STEPS: tl.constexpr, ROWS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sums over slices of the rows, STEPS steps of ROWS each, for the second kernel to add up.

    x (B, T, X) and y (B, T, Y), any strides, one of fp32, bf16, fp16 and fp64; shifts (X,) and (Y,)
    contiguous fp32 (fp64 for fp64), or None; partials (slices, X Y + 2 X + 2 Y) in their type: of
    each slice cross, sums and squares of x, of y. A step's rows are of one sample. Programs of a
    slice: tiles of cross, then units of x and of y. 2 B T X Y flops; B T (X + Y) values come in,
    X Y for each slice go out.

    fp32 is multiplied in three TF32 products, of what fits TF32 and what is left: one alone would
    round values to 11 bits. So are shifted 16-bit values, which are fp32 then; unshifted ones are
    multiplied as they are, exactly.
    """
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    SHIFTED: tl.constexpr = x_shift_ptr is not None or y_shift_ptr is not None
    tiles_x = (X + HEIGHT - 1) // HEIGHT
    tiles_y = (Y + WIDTH - 1) // WIDTH
    tiles = tiles_x * tiles_y
    program = tl.program_id(0).to(tl.int64)
    part = program // (tiles + tiles_x + tiles_y)
    place = program % (tiles + tiles_x + tiles_y)
    begin = part * STEPS
    partials_ptr += part * (XY + 2 * X + 2 * Y)
    if place < tiles:
        i = place % tiles_x * HEIGHT + tl.arange(0, HEIGHT)
        j = place // tiles_x * WIDTH + tl.arange(0, WIDTH)
        a = _load_shift(x_shift_ptr, i, X, ACC)
        b = _load_shift(y_shift_ptr, j, Y, ACC)
        cross = tl.zeros((HEIGHT, WIDTH), ACC)
        for step in tl.range(0, STEPS, num_stages=STAGES):
            x = _shifted(x_ptr, a, begin + step, B, T, i, X, x_sample, x_row, x_unit, ROWS, SHIFTED)
            y = _shifted(y_ptr, b, begin + step, B, T, j, Y, y_sample, y_row, y_unit, ROWS, SHIFTED)
            cross = add_dot(cross, tl.trans(x), y, PRECISION)
        inside = (i < X)[:, None] & (j < Y)[None, :]
        tl.store(partials_ptr + i[:, None] * Y + j[None, :], cross, mask=inside)
    elif place < tiles + tiles_x:
        _store_moments(
            x_ptr, x_shift_ptr, partials_ptr + XY, begin, B, T,
            (place - tiles) * HEIGHT, X, x_sample, x_row, x_unit,
            STEPS, ROWS, HEIGHT, STAGES,
        )  # fmt: skip
    else:
        _store_moments(
            y_ptr, y_shift_ptr, partials_ptr + XY + 2 * X, begin, B, T,
            (place - tiles - tiles_x) * WIDTH, Y, y_sample, y_row, y_unit,
            STEPS, ROWS, WIDTH, STAGES,
        )  # fmt: skip


@triton.jit
def _store_range(out_ptr, total, place, begin, count):
    """Those of ``total`` whose places are in [begin, begin + count)."""
    at = place - begin
    tl.store(out_ptr + at, total, mask=(at >= 0) & (at < count))


@triton.jit(do_not_specialize=["X", "Y", "XY"])
def cross_moments_total_kernel(
    partials_ptr, cross_ptr, x_sum_ptr, x_square_ptr, y_sum_ptr, y_square_ptr,
    X, Y, XY, SLICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The partials of all slices, added in order, to where they belong.

    All contiguous, of one type; SLICES + 1 times X Y + 2 X + 2 Y values move.
    """
    count = XY + 2 * X + 2 * Y
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), partials_ptr.dtype.element_ty)
    for _ in range(SLICES):
        total += tl.load(partials_ptr + place, mask=place < count, other=0.0)
        partials_ptr += count
    _store_range(cross_ptr, total, place, 0, XY)
    _store_range(x_sum_ptr, total, place, XY, X)
    _store_range(x_square_ptr, total, place, XY + X, X)
    _store_range(y_sum_ptr, total, place, XY + 2 * X, Y)
    _store_range(y_square_ptr, total, place, XY + 2 * X + Y, Y)


def why_not(
    x: torch.Tensor,
    y: torch.Tensor,
    x_shift: torch.Tensor | None = None,
    y_shift: torch.Tensor | None = None,
) -> str | None:
    """Why Triton cannot take this call, or None."""
    return missing(x.device.type)


def cross_moments(
    x: torch.Tensor,
    y: torch.Tensor,
    x_shift: torch.Tensor | None = None,
    y_shift: torch.Tensor | None = None,
    tile: Tile | None = None,
) -> tuple[torch.Tensor, ...]:
    """cross (X, Y), then sums and squares of x (X,) and of y (Y,); arguments as the op's, shifts
    contiguous in the type of sums.

    Raises:
        ValueError: the call is one that :func:`why_not` refuses.
    """
    require("cross_moments", why_not(x, y, x_shift, y_shift))
    acc, X, Y = torch.promote_types(x.dtype, torch.float32), x.shape[2], y.shape[2]
    shapes = ((X, Y), (X,), (X,), (Y,), (Y,))
    results = tuple(x.new_empty(shape, dtype=acc) for shape in shapes)
    if X + Y > 0:
        run(x, launches(x, y, x_shift, y_shift, results, tile))
    return results


def launches(
    x: torch.Tensor,
    y: torch.Tensor,
    x_shift: torch.Tensor | None,
    y_shift: torch.Tensor | None,
    results: tuple[torch.Tensor, ...],
    tile: Tile | None = None,
) -> list[Launch]:
    """What :func:`cross_moments` launches for this call, in order."""
    tile = tile or moments_tile(x.dtype, wide=_is_wide(x) and _is_wide(y))
    if _is_one_run(x) and _is_one_run(y):  # samples need not start steps of their own
        x, y = (rows.view(1, -1, rows.shape[2]) if rows.numel() else rows for rows in (x, y))
    (B, T, X), Y = x.shape, y.shape[2]
    tiles_x, tiles_y, steps = -(-X // tile.rows), -(-Y // tile.columns), B * -(-T // tile.depth)
    programs = tiles_x * tiles_y + tiles_x + tiles_y
    each = -(-steps // row_slices(programs, steps))
    slices, count = max(-(-steps // max(each, 1)), 1), X * Y + 2 * X + 2 * Y
    partials = results[0].new_empty((slices, count))
    arguments = (x, y, x_shift, y_shift, partials, B, T, X, Y, X * Y, *x.stride(), *y.stride())
    options = {
        "STEPS": each,
        "ROWS": tile.depth,
        "HEIGHT": tile.rows,
        "WIDTH": tile.columns,
        "STAGES": tile.stages,
        "PRECISION": "ieee" if x.dtype == torch.float64 else "tf32x3",
        "num_warps": tile.num_warps,
        "maxnreg": REGISTERS,
    }
    total_options = {"SLICES": slices, "BLOCK": BLOCK, "num_warps": 4}
    total_arguments = (partials, *results, X, Y, X * Y)
    return [
        Launch(cross_moments_partial_kernel, slices * programs, arguments, options),
        Launch(cross_moments_total_kernel, -(-count // BLOCK), total_arguments, total_options),
    ]


def _is_one_run(x: torch.Tensor) -> bool:
    """Whether the rows of all samples are one stride apart."""
    return x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)


def _is_wide(x: torch.Tensor) -> bool:
    """Whether Triton knows that the units of a row lie side by side in whole 16-byte accesses."""
    starts = stride(x, 0), stride(x, 1), x.shape[2]
    return x.stride(2) == 1 and x.data_ptr() % 16 == 0 and all(n % 16 == 0 for n in starts)

"""cross_moments: what the correlations between the units of two networks are made of.

    cross[i, j] = sum_t (x_ti - a_i) (y_tj - b_j)          t over all rows, a and b the shifts
    x_sum[i]    = sum_t (x_ti - a_i)                       and so y_sum, of y_tj - b_j
    x_square[i] = sum_t (x_ti - a_i)^2                     and so y_square

x and y are activations of two networks on the same inputs. With sums over all T rows,

    cov_ij = cross_ij / T - (x_sum_i / T) (y_sum_j / T),   var_i = x_square_i / T - (x_sum_i / T)^2

are the same for every shift, and with shifts near the means nothing is lost where units are large
beside their spread. Sums of batches with the same shifts add up to those of all: in fp64, since the
results of a batch are rounded to fp32. From these follow the activation similarities of MuDSC
(arXiv 2403.01753, CVPR 2024) for matching the units of networks of different origin.

Numerics: a value is shifted in fp32 (fp64 for fp64) before it is multiplied; sums of blocks of rows
in fp32, blocks in a fixed order, so that the same input gives the same bits on every run.

Traffic: x and y read once, X * Y results. 2 T X Y flops.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._registry import Op
from . import _arena


class CrossMoments(NamedTuple):
    """Sums over rows of shifted activations, fp32 (fp64 for fp64): ``cross`` (X, Y), ``x_sum`` and
    ``x_square`` (X,), ``y_sum`` and ``y_square`` (Y,)."""

    cross: Tensor
    x_sum: Tensor
    x_square: Tensor
    y_sum: Tensor
    y_square: Tensor


def cross_moments(
    x: Tensor, y: Tensor, x_shift: Tensor | None = None, y_shift: Tensor | None = None
) -> CrossMoments:
    """The sums above, in one pass over x and y; the shifted copies are never made.

    Args:
        x: (T, X) or, all B * T rows, (B, T, X): fp32, bf16, fp16 or fp64. Any strides: maps
            (B, C, H, W) of a convolution are ``maps.flatten(2).mT``, without a copy.
        y: (T, Y) or (B, T, Y) in x's dtype.
        x_shift: a (X,), such as the means of the first batch, in fp32 or a type it holds exactly
            (fp64 for fp64 x); None is zero.
        y_shift: b (Y,), likewise.

    Returns:
        A :class:`CrossMoments`. Not differentiable: the networks are frozen.

    Raises:
        TypeError: an argument that is no tensor.
        ValueError: shapes, dtypes or devices that do not fit, all of them named.
    """
    _checks.check_tensors("cross_moments", x=x, y=y)
    shifts = {"x_shift": x_shift, "y_shift": y_shift}
    _checks.check_tensors("cross_moments", **{k: v for k, v in shifts.items() if v is not None})
    if x.ndim == 2 and y.ndim == 2:
        x, y = x[None], y[None]
    return CrossMoments(*OP(x, y, x_shift, y_shift))


def _faults(
    x: Tensor, y: Tensor, x_shift: Tensor | None = None, y_shift: Tensor | None = None
) -> list[str]:
    found = []
    if x.dtype not in _checks.FLOAT_DTYPES:
        found.append(f"x must be fp32, bf16, fp16 or fp64, got {x.dtype}")
    if x.ndim != 3 or y.ndim != 3 or x.shape[:2] != y.shape[:2]:
        came = f"{_checks.shape(x)} and {_checks.shape(y)}"
        found.append(f"x and y must be (T, X) and (T, Y), or (B, T, X) and (B, T, Y), got {came}")
    if y.dtype != x.dtype:
        found.append(f"y must be {x.dtype} like x, got {y.dtype}")
    sums = _checks.accumulation_dtype(x.dtype)
    for name, shift, of in (("x_shift", x_shift, x), ("y_shift", y_shift, y)):
        if shift is None:
            continue
        if of.ndim == 3 and shift.shape != of.shape[2:]:
            wanted = _checks.shape(of.shape[2:])
            found.append(f"{name} must be {wanted}, got {_checks.shape(shift)}")
        if not shift.is_floating_point() or torch.promote_types(shift.dtype, sums) != sums:
            found.append(f"{name} must be {sums} or a float type it holds, got {shift.dtype}")
    for name, tensor in (("x", x), ("y", y), ("x_shift", x_shift), ("y_shift", y_shift)):
        if tensor is None:
            continue
        found += _checks.layout_faults(name, tensor)
        if tensor.device != x.device:
            found.append(f"{name} must be on {x.device} like x, got {tensor.device}")
    return found


def cross_moments_reference(
    x: Tensor, y: Tensor, x_shift: Tensor | None = None, y_shift: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The formulas in plain PyTorch, on shifted copies."""
    acc = _checks.accumulation_dtype(x.dtype)
    # cuBLAS takes no rows that are 2^31 elements apart.
    rows_x, rows_y = (z.to(acc).flatten(0, 1).contiguous() for z in (x, y))
    if x_shift is not None:
        rows_x = rows_x - x_shift.to(acc)
    if y_shift is not None:
        rows_y = rows_y - y_shift.to(acc)
    return (
        rows_x.T @ rows_y,
        rows_x.sum(0),
        rows_x.square().sum(0),
        rows_y.sum(0),
        rows_y.square().sum(0),
    )


def _fake(
    x: Tensor, y: Tensor, x_shift: Tensor | None = None, y_shift: Tensor | None = None
) -> tuple[Tensor, ...]:
    acc = _checks.accumulation_dtype(x.dtype)
    X, Y = x.shape[2], y.shape[2]
    shapes = ((X, Y), (X,), (X,), (Y,), (Y,))
    return tuple(x.new_empty(shape, dtype=acc) for shape in shapes)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw, acc = _arena.Draw(device, dtype, seed=25), _checks.accumulation_dtype(dtype)
    yield draw.normal(2, 9, 5), draw.normal(2, 9, 3), draw.normal(5), draw.normal(3).to(acc)
    yield draw.normal(1, 300, 33), draw.normal(1, 300, 17), None, None
    maps, tokens = draw.normal(3, 18, 5, 5), draw.normal(3, 26, 40)
    yield maps.flatten(2).mT, tokens[:, 1:, 3:38], draw.normal(18).to(acc), None
    yield draw.normal(2, 1, 1), draw.normal(2, 1, 1), None, draw.normal(1)
    yield draw.normal(4, 0, 2), draw.normal(4, 0, 3), draw.normal(2), None
    yield draw.normal(1, 4, 0), draw.normal(1, 4, 3), None, draw.normal(3)


def _prepare(
    x: Tensor, y: Tensor, x_shift: Tensor | None = None, y_shift: Tensor | None = None
) -> tuple[Tensor | None, ...]:
    """Shifts contiguous in the type of sums."""
    acc = _checks.accumulation_dtype(x.dtype)
    shifts = (None if a is None else a.to(acc).contiguous() for a in (x_shift, y_shift))
    return x, y, *shifts


OP = Op(
    "cross_moments",
    "(Tensor x, Tensor y, Tensor? x_shift=None, Tensor? y_shift=None) "
    "-> (Tensor cross, Tensor x_sum, Tensor x_square, Tensor y_sum, Tensor y_square)",
    reference=cross_moments_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "cross_moments"),
    terms=lambda x, *_: max(1, x.shape[0] * x.shape[1]),
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", prepare=_prepare)
OP.add_triton(prepare=_prepare)

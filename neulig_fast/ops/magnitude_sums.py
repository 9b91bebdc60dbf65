"""magnitude_sums: sums of magnitudes of task vectors, before and after elements are dropped.

    d_i = params_i - base            params_i where there is no base
    sums[s, 0, i] = sum_p |d_i[p]|   (p over the columns of segment s)
    sums[s, 1, i] = the same of the elements that a rule keeps

Their ratio is what task vectors of DARE (arXiv 2311.03099) and its relatives are multiplied by in
mergekit, to have the sum of magnitudes that they had. Bounds, cuts and draws are those of
:func:`neulig_fast.merge_task_vectors`, element by element.

Numerics: differences in fp32 (fp64 for fp64 params), and short sums of magnitudes too, over blocks
of columns in a fixed order that never cross a segment; their totals in fp64. A backend gives the
same bits on every run and for every number of threads; backends agree within the tolerance rule. A
magnitude that is NaN passes every bound, and is in both sums unless a draw dropped it.

Traffic: (N + 1) * P values read once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _checks
from .._registry import Op
from . import _arena, _sharded, _task_vectors
from ._task_vectors import Call

if TYPE_CHECKING:
    from ..segments import Segments


def magnitude_sums(
    params: Tensor,
    base: Tensor | None = None,
    segments: Tensor | Sequence[int] | Segments | None = None,
    *,
    lower: Tensor | None = None,
    lower_cut: Tensor | None = None,
    upper: Tensor | None = None,
    upper_cut: Tensor | None = None,
    density: Tensor | None = None,
    seed: int = 0,
    streams: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """Sums of magnitudes of N task vectors, per segment, with and without what a rule drops.

    Args:
        params: (N, P), one row per expert: fp32, bf16, fp16 or fp64. Rows may be strided.
        base: (P,) in the dtype of ``params``; None: ``params`` are task vectors already.
        segments: as in :func:`neulig_fast.blend`; None is one segment.
        lower, lower_cut, upper, upper_cut, density, seed, streams, start: as in
            :func:`neulig_fast.merge_task_vectors`.

    Returns:
        (S, 2, N) in fp64: of all elements, and of those that are kept. Not differentiable.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes, devices or options that do not fit, all listed; a DTensor.
    """
    _checks.check_tensors("magnitude_sums", params=params)
    rule = (lower, lower_cut, upper, upper_cut, density, seed, streams, start)
    call = _call(params, base, None, *rule)
    _task_vectors.check_types("magnitude_sums", call)
    if _sharded.is_dtensor(*(part for part in call if isinstance(part, Tensor))):
        raise ValueError("magnitude_sums: takes plain tensors, got a DTensor")
    return OP(params, base, _arena.boundaries("magnitude_sums", segments, params), *rule)


def _call(
    params: Tensor, base: Tensor | None = None, _segments: Tensor | None = None,
    lower: Tensor | None = None, lower_cut: Tensor | None = None, upper: Tensor | None = None,
    upper_cut: Tensor | None = None, density: Tensor | None = None, seed: int = 0,
    streams: Tensor | None = None, start: int = 0,
) -> Call:  # fmt: skip
    """The merge of task vectors that drops the same; every one weighs 1."""
    ones = torch.ones(params.shape[:1], device=params.device)
    bounds = (lower, lower_cut, upper, upper_cut)
    return Call(params, ones, base, None, *bounds, density, seed, streams, start)


def _faults(
    params: Tensor, base: Tensor | None = None, segments: Tensor | None = None, *rule: Any
) -> list[str]:
    found = _task_vectors.faults(_call(params, base, segments, *rule))
    return [*found, *(f for f in _arena.faults(params, segments) if f not in found)]


def magnitude_sums_reference(
    params: Tensor, base: Tensor | None = None, segments: Tensor | None = None,
    lower: Tensor | None = None, lower_cut: Tensor | None = None, upper: Tensor | None = None,
    upper_cut: Tensor | None = None, density: Tensor | None = None, seed: int = 0,
    streams: Tensor | None = None, start: int = 0,
) -> Tensor:  # fmt: skip
    """Expert by expert in plain PyTorch."""
    bounds = (lower, lower_cut, upper, upper_cut)
    call = _call(params, base, segments, *bounds, density, seed, streams, start)
    ranges = [(0, params.shape[1])] if segments is None else _arena.slices(segments)
    sums = params.new_zeros((len(ranges), 2, params.shape[0]), dtype=torch.float64)
    acc = _checks.accumulation_dtype(params.dtype)
    for i, row in enumerate(params):
        d = row.to(acc) if base is None else row.to(acc) - base.to(acc)
        kept = d.abs().masked_fill(_task_vectors.dropped(call, i, d), 0)
        for s, (first, last) in enumerate(ranges):
            sums[s, 0, i] = d[first:last].abs().sum(dtype=torch.float64)
            sums[s, 1, i] = kept[first:last].sum(dtype=torch.float64)
    return sums


def _fake(
    params: Tensor, base: Tensor | None = None, segments: Tensor | None = None,
    lower: Tensor | None = None, lower_cut: Tensor | None = None, upper: Tensor | None = None,
    upper_cut: Tensor | None = None, density: Tensor | None = None, seed: int = 0,
    streams: Tensor | None = None, start: int = 0,
) -> Tensor:  # fmt: skip
    count = 1 if segments is None else segments.shape[0] - 1
    return params.new_empty((count, 2, params.shape[0]), dtype=torch.float64)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw, acc = _arena.Draw(device, dtype, seed=29), _checks.accumulation_dtype(dtype)

    def coarse(*shape: int) -> Tensor:
        return (draw.normal(*shape) * 4).round() / 4

    def numbers(*values: float) -> Tensor:
        return torch.tensor(values, dtype=acc, device=device)

    low, low_cut = numbers(0.5, 0.25, 1.0), draw.bounds(7, 200, -3)
    high, high_cut = numbers(1.0, 2.5, 1.5), draw.bounds(9, 2**40, 0)
    share, streams = numbers(0.5, 1.0, 0.1), draw.bounds(5, 2**33 + 1, -1)
    drawn, bounds = (share, -3, streams), (low, low_cut, high, high_cut)
    yield draw.normal(3, 17), None, None, *[None] * 5, 0, None, 0
    yield coarse(3, 0), coarse(0), None, *[None] * 4, share, 1, None, 5
    cut = draw.bounds(0, 0, 77, 1025)
    yield coarse(3, 1030)[:, 3:1028], coarse(1025), cut, *bounds, None, 0, None, 2
    yield coarse(3, 300), coarse(300), None, *[None] * 4, *drawn, 2**34 + 3
    yield coarse(3, 290)[:, 1:], None, draw.bounds(0, 33, 289), *bounds, *drawn, 61


def _prepare(
    params: Tensor, base: Tensor | None = None, segments: Tensor | None = None, *rule: Any
) -> tuple[Any, ...]:
    sums, call = _fake(params, base, segments), _call(params, base, segments, *rule)
    columns = _arena.contiguous(segments)
    return sums, params, base, columns, *_task_vectors.tables(call), call.seed, call.start


def _check(
    params: Tensor, base: Tensor | None = None, segments: Tensor | None = None, *rule: Any
) -> None:
    _arena.check_values("magnitude_sums", params, segments)
    _task_vectors.check_values("magnitude_sums", _call(params, base, segments, *rule))


OP = Op(
    "magnitude_sums",
    "(Tensor params, Tensor? base=None, Tensor? segments=None, Tensor? lower=None, "
    "Tensor? lower_cut=None, Tensor? upper=None, Tensor? upper_cut=None, Tensor? density=None, "
    "SymInt seed=0, Tensor? streams=None, SymInt start=0) -> Tensor",
    native="(Tensor(a!) sums, Tensor params, Tensor? base, Tensor? segments, Tensor numbers, "
    "Tensor? places, int rule, int seed, int start) -> ()",
    reference=magnitude_sums_reference,
    fake=_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "magnitude_sums"),
    check=_check,
    terms=lambda params, *_: max(1, params.shape[1]),
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", prepare=_prepare, why_not=lambda *args: _task_vectors.why_not(_call(*args)))
OP.add_triton(prepare=_prepare)

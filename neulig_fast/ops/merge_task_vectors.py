"""merge_task_vectors: task arithmetic, TIES, DARE and Model Breadcrumbs, merged in one pass.

    d_i = params_i - base           task vectors; params_i where there is no base
    v_i = scales_i d_i              0 where the element is dropped: too small, too large, or drawn
    t_i = weights_i v_i
    sigma = the elected sign        of sum_i t_i ("weighted_sum"), sum_i v_i ("sum"),
                                    sum_i weights_i sign(v_i) ("weighted_count"), sum_i sign(v_i)
    q = sum_i t_i, or the t_i of largest magnitude ("max"), over experts that agree with sigma,
        divided by the number of them ("count") or their weights' sum ("weights")
    theta = base + lam q

Task arithmetic (arXiv 2212.04089) is this with weights alone, TIES-Merging (2306.01708) with
``lower`` and an election, DARE (2311.03099) with ``density`` and ``scales``, Model Breadcrumbs
(2312.06795) with ``lower`` and ``upper``.

An expert agrees with sigma where the t_i (with "sum" and "count" the v_i) has that sign, or is NaN;
without an election where its element is kept. Zero never agrees. A sum that is zero, or NaN because
infinities of both signs were added, elects ``zero_sign``; a ``zero_sign`` of 0 is nobody's, but
of infinities the positive ones'. Divisors: a "count" is at least 1; a sum of agreeing weights that
is 0 counts as 1; without an election "weights" is the sum of all experts' weights, kept or not,
and counts as 1 below 1e-8 in magnitude. If nobody agrees, q is 0.

NaN: a d_i that is NaN passes every bound, and so reaches theta unless a draw dropped it. A bound
that is NaN drops nothing.

Numerics: every step in fp32 (fp64 for fp64 params), sums from 0 in expert order, a multiplication
and then an addition, theta rounded to nearest once at the end: the same bits on every backend,
thread count and tiling.

Traffic: (N + 1) * P values read and P written, once. 4 * N * P flops and, with an election, about
10 * N * P operations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._memory import large_pages
from .._registry import OPS, Op
from . import _arena, _sharded, _task_vectors
from ._task_vectors import Call


def merge_task_vectors(
    params: Tensor,
    weights: Tensor,
    base: Tensor | None = None,
    *,
    scales: Tensor | None = None,
    lower: Tensor | None = None,
    lower_cut: Tensor | None = None,
    upper: Tensor | None = None,
    upper_cut: Tensor | None = None,
    density: Tensor | None = None,
    seed: int = 0,
    streams: Tensor | None = None,
    start: int = 0,
    lam: float = 1.0,
    elect: str = "none",
    zero_sign: int = 1,
    divide: str = "none",
    combine: str = "sum",
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Merge the task vectors of N experts and add them to their base.

    Args:
        params: (N, P), one row per expert: fp32, bf16, fp16 or fp64. Rows may be strided.
        weights: (N,), any float dtype.
        base: (P,) in the dtype of ``params``, what the experts were fine-tuned from; None:
            ``params`` are task vectors already, and so is the result.
        scales: (N,), any float dtype; 1 where None.
        lower, upper: (N,) in fp32 or a type it holds exactly (fp64 for fp64 ``params``): elements
            with ``lower <= |d| <= upper`` are kept.
        lower_cut, upper_cut: (N,) int64, which of the elements that equal a bound are kept: those
            whose place is below ``lower_cut``, at or beyond ``upper_cut``; all where None.
        density: (N,) from 0 to 1, any float dtype: the chance of an element to be kept.
        seed, streams: key of the draws, a 64-bit integer, and (N,) int64, one stream of draws per
            expert; 0, 1, ... where None. Another tensor of the same model wants other streams.
        start: place of the first column in its whole tensor, for one that comes in tiles: cuts and
            draws go by place. At least 0.
        lam: what the merged task vector is multiplied by.
        elect: "none", "weighted_sum", "sum", "weighted_count" or "count".
        zero_sign: 1, -1, or 0 for nobody: what a sum of zero elects.
        divide: "none", "weights" or "count"; "none" with ``combine="max"``.
        combine: "sum" or "max", the term of largest magnitude, of equal ones the first expert's.
        out_dtype: fp32, bf16, fp16 or fp64; by default that of ``params``, or ``out``'s own.
        out: (P,) contiguous in any of these dtypes: written and returned, and nothing is allocated.

    Returns:
        (P,). Not differentiable: where gradients are needed, use :func:`neulig_fast.blend`.

    Raises:
        TypeError: an argument of another type.
        ValueError: shapes, dtypes, devices or options that do not fit, all of them listed; an
            ``out`` that shares memory with another argument.
        RuntimeError: with ``out`` in grad mode, an argument that requires grad.
    """
    call = Call(
        *(params, weights, base, scales, lower, lower_cut, upper, upper_cut, density, seed),
        *(streams, start, lam, elect, zero_sign, divide, combine),
    )
    _task_vectors.check_types("merge_task_vectors", call)
    if _sharded.is_dtensor(out, *(part for part in call if isinstance(part, Tensor))):
        raise ValueError("merge_task_vectors: takes plain tensors, got a DTensor")
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise TypeError(f"merge_task_vectors: out_dtype must be a torch.dtype, got {out_dtype!r}")
    if out is None:
        return OP(*call, out_dtype)
    _checks.check_tensors("merge_task_vectors", out=out)
    if out_dtype not in (None, out.dtype):
        raise ValueError(f"merge_task_vectors: out is {out.dtype}, and out_dtype {out_dtype}")
    OPS["merge_task_vectors_"](out, *call)
    return out


def _faults(*args: Any) -> list[str]:
    call, out_dtype = Call(*args[:17]), args[17] if len(args) > 17 else None
    found = _task_vectors.faults(call)
    if out_dtype is not None and out_dtype not in _checks.FLOAT_DTYPES:
        found.append(f"out_dtype must be fp32, bf16, fp16 or fp64, got {out_dtype}")
    return found


def merge_task_vectors_reference(
    params: Tensor, weights: Tensor, base: Tensor | None = None, scales: Tensor | None = None,
    lower: Tensor | None = None, lower_cut: Tensor | None = None, upper: Tensor | None = None,
    upper_cut: Tensor | None = None, density: Tensor | None = None, seed: int = 0,
    streams: Tensor | None = None, start: int = 0, lam: float = 1.0, elect: str = "none",
    zero_sign: int = 1, divide: str = "none", combine: str = "sum",
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The formulas in plain PyTorch; :func:`_task_vectors.merged` has them."""
    call = Call(
        *(params, weights, base, scales, lower, lower_cut, upper, upper_cut, density, seed),
        *(streams, start, lam, elect, zero_sign, divide, combine),
    )
    return _task_vectors.merged(call, out_dtype or params.dtype)


def merge_task_vectors_fake(
    params: Tensor, weights: Tensor, base: Tensor | None = None, scales: Tensor | None = None,
    lower: Tensor | None = None, lower_cut: Tensor | None = None, upper: Tensor | None = None,
    upper_cut: Tensor | None = None, density: Tensor | None = None, seed: int = 0,
    streams: Tensor | None = None, start: int = 0, lam: float = 1.0, elect: str = "none",
    zero_sign: int = 1, divide: str = "none", combine: str = "sum",
    out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    return params.new_empty(params.shape[1:], dtype=out_dtype or params.dtype)


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Calls without out_dtype. Values are multiples of 1/4, so that many are equal."""
    draw, acc = _arena.Draw(device, dtype, seed=26), _checks.accumulation_dtype(dtype)

    def coarse(*shape: int) -> Tensor:
        return (draw.normal(*shape) * 4).round() / 4

    def numbers(*values: float) -> Tensor:
        return torch.tensor(values, dtype=acc, device=device)

    def places(*values: int) -> Tensor:
        return torch.tensor(values, device=device)

    share = torch.tensor([0.5, 1.0, 0.1], dtype=torch.float64, device=device)
    w = numbers(0.5, -1.0, 0.25)
    yield Call(draw.normal(3, 17), w, draw.normal(17))
    yield Call(draw.normal(1, 1025), w[:1], lam=0.5, divide="weights")
    yield Call(coarse(3, 0), w, coarse(0), elect="count")
    ties: dict[str, Any] = {"lower": numbers(0.5, 0.25, 1.0), "lower_cut": places(7, 200, -3)}
    yield Call(
        coarse(3, 1030)[:, 3:1028], w.abs(), coarse(1025), **ties, elect="weighted_sum",
        divide="weights", start=2,
    )  # fmt: skip
    bounds: dict[str, Any] = {
        "upper": numbers(1.0, 2.5, 1.5),
        "upper_cut": places(9, 2**40, 0),
        **ties,
    }
    drawn: dict[str, Any] = {"density": share, "seed": -3, "streams": places(5, 2**33 + 1, -1)}
    yield Call(coarse(3, 300), w, coarse(300), w, **bounds, divide="count", zero_sign=-1)
    yield Call(coarse(3, 77), w, coarse(77), w, **drawn, start=2**34 + 3, elect="sum", zero_sign=0)
    yield Call(coarse(3, 65), w, None, None, **bounds, **drawn, elect="count", combine="max")
    rows = coarse(11, 96)
    many: dict[str, Any] = {"elect": "weighted_count", "zero_sign": 0, "divide": "count"}
    yield Call(rows, coarse(11), coarse(96), lower=coarse(11).abs().to(acc), **many)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    types = (None, torch.float64, None, torch.bfloat16, _arena.other_dtype(dtype))
    for k, call in enumerate(samples(device, dtype)):
        yield *call, types[k % len(types)]


def _prepare(*args: Any) -> tuple[Any, ...]:
    out = large_pages(merge_task_vectors_fake(*args))
    return _task_vectors.kernel_arguments(out, Call(*args[:17]))


OP = Op(
    "merge_task_vectors",
    "(Tensor params, Tensor weights, Tensor? base=None, Tensor? scales=None, Tensor? lower=None, "
    "Tensor? lower_cut=None, Tensor? upper=None, Tensor? upper_cut=None, Tensor? density=None, "
    "SymInt seed=0, Tensor? streams=None, SymInt start=0, float lam=1.0, str elect='none', "
    "int zero_sign=1, str divide='none', str combine='sum', ScalarType? out_dtype=None) -> Tensor",
    native="(Tensor(a!) out, Tensor params, Tensor? base, Tensor numbers, Tensor? places, "
    "int rule, int seed, int start, int elect, int zero_sign, int divide, int combine) -> ()",
    reference=merge_task_vectors_reference,
    fake=merge_task_vectors_fake,
    faults=_faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    guard=functools.partial(_arena.check_alignment, "merge_task_vectors"),
    check=lambda *args: _task_vectors.check_values("merge_task_vectors", Call(*args[:17])),
    elementwise=True,
    not_offered={"cuda": "not written yet"},
)
OP.add_native(
    "cpu", prepare=_prepare, why_not=lambda *args: _task_vectors.why_not(Call(*args[:17]))
)
OP.add_triton(prepare=_prepare)

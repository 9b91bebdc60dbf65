"""merge_task_vectors_: merge_task_vectors into a tensor of the caller's, in that tensor's type.

What ``merge_task_vectors(..., out=out)`` calls: the bits of ``out_dtype=out.dtype``, no memory
allocated for the result, no gradient. It shares merge_task_vectors' room: the kernels only know
this form.

Traffic: as merge_task_vectors, (N + 1) * P values read and P written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._registry import Op
from . import _arena, _overlap, _task_vectors
from ._task_vectors import Call
from .merge_task_vectors import samples


def _faults(out: Tensor, *args: Any) -> list[str]:
    call = Call(*args)
    found = _task_vectors.faults(call) + _checks.layout_faults("out", out)
    if call.params.ndim == 2 and out.shape != call.params.shape[1:]:
        wanted = _checks.shape(call.params.shape[1:])
        found.append(f"out must be (P,) = {wanted}, got {_checks.shape(out)}")
    elif out.ndim == 1 and out.shape[0] > 1 and out.stride(0) != 1:
        found.append(f"out must be contiguous, got stride {out.stride(0)}")
    if out.dtype not in _checks.FLOAT_DTYPES:
        found.append(f"out must be fp32, bf16, fp16 or fp64, got {out.dtype}")
    if out.device != call.params.device:
        found.append(f"out must be on {call.params.device} like params, got {out.device}")
    return found


def _guard(out: Tensor, *args: Any) -> None:
    _refuse_shared(_overlap.by_address, out, *args)
    _arena.check_alignment("merge_task_vectors_", out, *args)


def _refuse_shared(place: _overlap.Place, out: Tensor, *others: Any) -> None:
    """ValueError if what is written is also read."""
    _checks.raise_all(
        "merge_task_vectors_",
        [
            f"out shares memory with {name}"
            for name, other in zip(OP.arguments[1:], others, strict=False)
            if isinstance(other, Tensor) and _overlap.rows_overlap(place, out, other)
        ],
    )


def merge_into_reference(
    out: Tensor, params: Tensor, weights: Tensor, base: Tensor | None = None,
    scales: Tensor | None = None, lower: Tensor | None = None, lower_cut: Tensor | None = None,
    upper: Tensor | None = None, upper_cut: Tensor | None = None, density: Tensor | None = None,
    seed: int = 0, streams: Tensor | None = None, start: int = 0, lam: float = 1.0,
    elect: str = "none", zero_sign: int = 1, divide: str = "none", combine: str = "sum",
) -> None:  # fmt: skip
    """The formulas in plain PyTorch; :func:`_task_vectors.merged` has them."""
    call = Call(
        *(params, weights, base, scales, lower, lower_cut, upper, upper_cut, density, seed),
        *(streams, start, lam, elect, zero_sign, divide, combine),
    )
    out.copy_(_task_vectors.merged(call, out.dtype))


def merge_into_fake(
    out: Tensor, params: Tensor, weights: Tensor, base: Tensor | None = None,
    scales: Tensor | None = None, lower: Tensor | None = None, lower_cut: Tensor | None = None,
    upper: Tensor | None = None, upper_cut: Tensor | None = None, density: Tensor | None = None,
    seed: int = 0, streams: Tensor | None = None, start: int = 0, lam: float = 1.0,
    elect: str = "none", zero_sign: int = 1, divide: str = "none", combine: str = "sum",
) -> None:  # fmt: skip
    """Nothing; but memory that tracing can see to be shared is refused there."""
    vectors = (scales, lower, lower_cut, upper, upper_cut, density, seed, streams)
    _refuse_shared(_overlap.by_storage, out, params, weights, base, *vectors)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for k, call in enumerate(samples(device, dtype)):
        out_dtype = dtype if k % 2 else _arena.other_dtype(dtype)
        yield torch.zeros_like(call[0][0], dtype=out_dtype), *call


OP = Op(
    "merge_task_vectors_",
    "(Tensor(a!) out, Tensor params, Tensor weights, Tensor? base=None, Tensor? scales=None, "
    "Tensor? lower=None, Tensor? lower_cut=None, Tensor? upper=None, Tensor? upper_cut=None, "
    "Tensor? density=None, SymInt seed=0, Tensor? streams=None, SymInt start=0, float lam=1.0, "
    "str elect='none', int zero_sign=1, str divide='none', str combine='sum') -> ()",
    room="merge_task_vectors",
    reference=merge_into_reference,
    fake=merge_into_fake,
    faults=_faults,
    guard=_guard,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=_samples,
    check=lambda out, *args: _task_vectors.check_values("merge_task_vectors_", Call(*args)),
    elementwise=True,
    not_offered={"cuda": "not written yet"},
)


def _prepare(out: Tensor, *args: Any) -> tuple[Any, ...]:
    return _task_vectors.kernel_arguments(out, Call(*args))


OP.add_native(
    "cpu", prepare=_prepare, why_not=lambda out, *args: _task_vectors.why_not(Call(*args))
)
OP.add_triton(prepare=_prepare, why_not=lambda module, out, *args: module.why_not(*args))

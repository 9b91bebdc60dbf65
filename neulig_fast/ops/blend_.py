"""blend_: a blend written into a tensor of the caller's, in that tensor's type.

    out[k, p] = sum_i weights[k, s(p), i] * params[i, p]

The bits are those of blend with ``out_dtype=out.dtype``. No memory is allocated for the result and
there is no gradient. It shares blend's room: the kernels only know this form.

Traffic: as blend, N * P values read once and K * P written once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _autograd, _checks
from .._registry import Op
from . import _arena, _overlap, _rounding, _scales, _sharded
from .blend import blend_faults, blend_reference, kernel_arguments

if TYPE_CHECKING:
    from ..segments import Segments


def blend_(
    out: Tensor,
    weights: Tensor,
    params: Tensor,
    segments: Tensor | Sequence[int] | Segments | None = None,
    rounding_seed: int | None = None,
    *,
    scales: Tensor | None = None,
    out_scales: Tensor | None = None,
) -> Tensor:
    """Blend into ``out`` and return it.

    Args:
        out: (P,) or (K, P) on the device of ``params``, in any of its types. Columns are
            contiguous, rows may be strided.
        weights, params, segments, rounding_seed, scales, out_scales: as :func:`neulig_fast.blend`.

    Raises:
        TypeError: an argument of another type. Nothing was written.
        ValueError: arguments that do not fit, all of them listed, or an ``out`` that shares memory
            with another argument or with itself. Nothing was written.
        RuntimeError: in grad mode, an argument that requires grad. Nothing was written.
    """
    _checks.check_tensors("blend_", out=out, weights=weights, params=params)
    if _sharded.is_dtensor(out, weights, params, scales, out_scales):
        raise ValueError("blend_: takes plain tensors, got a DTensor; blend takes those")
    bounds = _arena.boundaries("blend_", segments, params)
    _rounding.check_types("blend_", None, rounding_seed)
    if scales is not None or out_scales is not None:
        _scales.check_types("blend_", scales, out_scales)
        found = _faults(out, weights, params, bounds, rounding_seed)
        found += _scales.faults(weights, params, bounds, scales, out_scales)
        _checks.raise_all("blend_", found)
        _autograd.refuse_gradients("blend_", ("scales", "out_scales"), (scales, out_scales))
        weights = _scales.fold(weights, params, scales, out_scales)
    OP(out, weights, params, bounds, rounding_seed)
    return out


def _faults(
    out: Tensor,
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    rounding_seed: int | None = None,
) -> list[str]:
    found = blend_faults(weights, params, segments, out.dtype, rounding_seed)
    if params.ndim == 2:
        # Without a fault so far, the weights say how many rows there are.
        leading = weights.shape[: -1 if segments is None else -2] if not found else out.shape[:-1]
        found += _shape_faults(out, (*leading[:1], params.shape[1]))
    if out.device != params.device:
        found.append(f"out must be on {params.device} like params, got {out.device}")
    return found


def _shape_faults(out: Tensor, shape: tuple[int, ...]) -> list[str]:
    """What is wrong with the memory of ``out`` where ``shape`` is asked for."""
    if found := _checks.layout_faults("out", out):
        return found
    if out.shape != shape:
        return [f"out must be {_checks.shape(shape)}, got {_checks.shape(out)}"]
    if out.shape[-1] > 1 and out.stride(-1) != 1:
        return [f"out must have contiguous columns, got stride {out.stride(-1)}"]
    if out.ndim == 2 and out.shape[0] > 1 and out.stride(0) < out.shape[1]:
        return [f"the rows of out overlap: {out.shape[1]} columns, {out.stride(0)} apart"]
    return []


def _guard(
    out: Tensor,
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    rounding_seed: int | None = None,
) -> None:
    _refuse_shared(_overlap.by_address, out, weights, params, segments)
    _arena.check_alignment("blend_", out, weights, params, segments)


def _refuse_shared(place: _overlap.Place, out: Tensor, *others: Tensor | None) -> None:
    """ValueError if what is written is also read."""
    _checks.raise_all(
        "blend_",
        [
            f"out shares memory with {name}"
            for name, other in zip(OP.arguments[1:], others, strict=False)
            if other is not None and _overlap.rows_overlap(place, out, other)
        ],
    )


def blend_into_reference(
    out: Tensor,
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    rounding_seed: int | None = None,
) -> None:
    """The formula in plain PyTorch."""
    out.copy_(blend_reference(weights, params, segments, out.dtype, rounding_seed))


def blend_into_fake(
    out: Tensor,
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    rounding_seed: int | None = None,
) -> None:
    """Nothing; but memory that tracing can see to be shared is refused there."""
    _refuse_shared(_overlap.by_storage, out, weights, params, segments)


def _samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    draw = _arena.Draw(device, dtype, seed=23)
    yield draw.normal(17), draw.normal(3), draw.normal(3, 17), None, None
    yield draw.normal(2, 1030)[:, 3:1028], draw.normal(2, 5), draw.normal(5, 1025), None, None
    yield draw.normal(0), draw.normal(3), draw.normal(3, 0), None, None
    out, bounds = draw.normal(200).to(_arena.other_dtype(dtype)), draw.bounds(0, 1, 130, 200)
    yield out, draw.normal(3, 2), draw.normal(2, 200), bounds, None
    bounds = draw.bounds(0, 32, 32, 65, 96)
    yield draw.normal(3, 96), draw.normal(3, 4, 11), draw.normal(11, 96), bounds, None


OP = Op(
    "blend_",
    "(Tensor(a!) out, Tensor weights, Tensor params, Tensor? segments=None, "
    "SymInt? rounding_seed=None) -> ()",
    room="blend",
    reference=blend_into_reference,
    fake=blend_into_fake,
    faults=_faults,
    guard=_guard,
    order={"cpu": ("cpu", "torch"), "cuda": ("cuda", "triton", "torch")},
    samples=_samples,
    check=lambda out, weights, params, segments=None, *_: _arena.check_values(
        "blend_", params, segments
    ),
    elementwise=True,
)
OP.add_native(
    "cpu", prepare=kernel_arguments, why_not=lambda out, w, params, *_: _arena.why_not(params)
)
OP.add_native(
    "cuda", prepare=kernel_arguments, why_not=lambda out, w, params, *_: _arena.why_not_cuda(params)
)
OP.add_triton(prepare=kernel_arguments, why_not=lambda module, out, *args: module.why_not(*args))

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

from .. import _checks
from .._registry import Op
from . import _arena, _rounding, _scales
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
        ValueError: arguments that do not fit, all of them listed, or an ``out`` that shares memory
            with another argument or with itself. Nothing was written.
        RuntimeError: in grad mode, an argument that requires grad. Nothing was written.
    """
    bounds = _arena.boundaries("blend_", segments, params)
    _rounding.check_seed("blend_", rounding_seed)
    if scales is not None or out_scales is not None:
        found = _faults(out, weights, params, bounds, rounding_seed)
        found += _scales.faults(weights, params, bounds, scales, out_scales)
        _checks.raise_all("blend_", found)
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
    if out.device != params.device:
        found.append(f"out must be on {params.device} like params, got {out.device}")
    if not found:
        shape = (*weights.shape[: -1 if segments is None else -2], params.shape[1])
        if out.shape != shape:
            found.append(f"out must be {_checks.shape(shape)}, got {_checks.shape(out)}")
        elif out.shape[-1] > 1 and out.stride(-1) != 1:
            found.append(f"out must have contiguous columns, got stride {out.stride(-1)}")
        elif out.ndim == 2 and out.shape[0] > 1 and out.stride(0) < out.shape[1]:
            found.append(f"the rows of out overlap: {out.shape[1]} columns, {out.stride(0)} apart")
    return found


def _guard(
    out: Tensor,
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None = None,
    rounding_seed: int | None = None,
) -> None:
    """ValueError if what is written is also read."""
    others = {"weights": weights, "params": params, "segments": segments}
    shared = [n for n, t in others.items() if t is not None and _arena.overlap(out, t)]
    _checks.raise_all("blend_", [f"out shares memory with {name}" for name in shared])


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
    return None


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

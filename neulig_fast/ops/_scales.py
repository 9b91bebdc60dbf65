"""Scales of stored values, folded into a blend's weights.

A stored value times its scale is a parameter; a stored result times its scale is a merged
parameter. Then ``result = sum_i (weights_i * scale_i / out_scale) * stored_i``: the kernels see
weights alone, and gradients of scales are autograd's business.
"""

from __future__ import annotations

from torch import Tensor

from .. import _checks


def check_types(op: str, scales: object, out_scales: object) -> None:
    """TypeError unless each is a tensor or None."""
    given = {"scales": scales, "out_scales": out_scales}
    _checks.check_tensors(op, **{name: s for name, s in given.items() if s is not None})


def faults(
    weights: Tensor,
    params: Tensor,
    segments: Tensor | None,
    scales: Tensor | None,
    out_scales: Tensor | None,
) -> list[str]:
    """What is wrong with the form of ``scales`` and ``out_scales``."""
    found = []
    n = tuple(params.shape[:1])
    middle = () if segments is None else (segments.numel() - 1,)
    outer = tuple(weights.shape[: max(weights.ndim - 1 - len(middle), 0)])
    fits = [n] if segments is None else [n, middle + n]
    if scales is not None:
        found += _faults("scales", scales, params, fits, "(N,), with segments also (S, N)")
    fits = [(), outer] if segments is None else [(), middle, outer + middle]
    if out_scales is not None:
        forms = "() or (K,), with segments (), (S,) or (K, S)"
        found += _faults("out_scales", out_scales, params, fits, forms)
    return found


def _faults(
    name: str, scales: Tensor, params: Tensor, fits: list[tuple[int, ...]], forms: str
) -> list[str]:
    found = _checks.layout_faults(name, scales)
    if not scales.is_floating_point() or scales.device != params.device:
        found.append(
            f"{name} must be floating point on {params.device} like params, "
            f"got {scales.dtype} on {scales.device}"
        )
    if tuple(scales.shape) not in fits:
        found.append(f"{name} must be {forms}; got {_checks.shape(scales)}")
    return found


def fold(
    weights: Tensor, params: Tensor, scales: Tensor | None, out_scales: Tensor | None
) -> Tensor:
    """``weights * scales / out_scales`` in the accumulation type of ``params``."""
    if scales is None and out_scales is None:
        return weights
    accumulate = _checks.accumulation_dtype(params.dtype)
    weights = weights.to(accumulate)
    if scales is not None:
        weights = weights * scales.to(accumulate)
    if out_scales is not None:
        divisor = out_scales.to(accumulate)
        weights = weights / (divisor[..., None] if divisor.ndim else divisor)
    return weights

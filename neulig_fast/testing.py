"""What tests and benchmarks share: the tolerance rule and the walk over ops, backends, samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from . import _checks
from ._registry import BACKENDS, OPS, Op

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def map_tensors(args: Iterable[Any], change: Callable[[torch.Tensor], Any]) -> tuple[Any, ...]:
    """``args`` with every tensor, also those in lists, replaced by ``change(tensor)``."""

    def changed(a: Any) -> Any:
        if isinstance(a, list):
            return [changed(item) for item in a]
        return change(a) if isinstance(a, torch.Tensor) else a

    return tuple(changed(a) for a in args)


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """``args`` with every floating-point tensor, and every type that is asked for, in ``dtype``."""
    changed = map_tensors(args, lambda a: a.to(dtype) if a.is_floating_point() else a)
    return tuple(dtype if isinstance(a, torch.dtype) else a for a in changed)


def outputs(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors an op returned, as a tuple."""
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def result(op: Op, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """What ``function`` makes of ``args``: for an op that writes, what a copy of its output holds.

    The copy has the strides of the original and held NaN before.
    """
    if not op.writes:
        return function(*args)
    out = torch.empty_strided(
        args[0].shape, args[0].stride(), dtype=args[0].dtype, device=args[0].device
    ).fill_(torch.nan)
    if function(out, *args[1:]) is not None:
        raise AssertionError(f"{op.name} writes, and returns something too")
    return out


def allowed_error(
    working: torch.Tensor, oracle: torch.Tensor, terms: int = 1, eps: float | None = None
) -> float:
    """The largest error a backend may have against ``oracle`` (fp64).

    Twice the error of the plain-PyTorch reference at the working dtype, plus 4 eps * scale, times
    sqrt(terms) for a reduction over ``terms`` terms. ``eps`` is that of the arithmetic, for results
    in a wider type than it; None is that of ``working``.
    """
    if oracle.numel() == 0:
        return 0.0
    scale = float(oracle.abs().max())
    floor = 4 * (eps or torch.finfo(working.dtype).eps) * scale * terms**0.5
    return 2 * float((working.double() - oracle).abs().max()) + floor


def assert_within_rule(
    actual: torch.Tensor,
    working: torch.Tensor,
    oracle: torch.Tensor,
    terms: int = 1,
    eps: float | None = None,
) -> None:
    """AssertionError unless ``actual`` obeys the tolerance rule against the fp64 ``oracle``.

    Non-finite entries must be the same in both; the rule holds for the others.
    """
    if actual.shape != oracle.shape or actual.dtype != working.dtype:
        raise AssertionError(
            f"expected {tuple(oracle.shape)} {working.dtype}, "
            f"got {tuple(actual.shape)} {actual.dtype}"
        )
    actual, working, oracle = actual.detach().cpu(), working.detach().cpu(), oracle.detach().cpu()
    finite = oracle.isfinite()
    special = torch.where(finite, 0.0, oracle)  # NaN, inf and -inf
    if not torch.equal(
        torch.where(actual.isfinite(), 0.0, actual.double()).nan_to_num(0.5, 1.0, -1.0),
        special.nan_to_num(0.5, 1.0, -1.0),
    ):
        raise AssertionError("non-finite entries differ from the oracle's")
    zero = torch.zeros((), dtype=torch.float64)
    oracle = torch.where(finite, oracle, zero)
    working = torch.where(finite, working, zero.to(working.dtype))
    error = torch.where(finite, (actual.double() - oracle).abs(), zero)
    worst = float(error.max()) if error.numel() else 0.0
    allowed = allowed_error(working, oracle, terms, eps)
    if not worst <= allowed:
        raise AssertionError(f"error {worst:.3e} is over the allowed {allowed:.3e}")


def assert_op_close(op: Op, actual: Any, args: tuple[Any, ...]) -> None:
    """The tolerance rule for every output of ``op`` on ``args``, against its fp64 reference.

    Counts must be the reference's at the working dtype: what they count may depend on rounding.
    """
    working = outputs(result(op, op.reference, args))
    oracle = outputs(result(op, op.reference, cast(args, torch.float64)))
    # fp64 sums of fp32 products are as exact as the products.
    arithmetic = next(
        a.dtype for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()
    )
    least = torch.finfo(_checks.accumulation_dtype(arithmetic)).eps
    for got, at_dtype, exact in zip(outputs(actual), working, oracle, strict=True):
        if at_dtype.is_floating_point():
            eps = max(least, torch.finfo(at_dtype.dtype).eps)
            assert_within_rule(got, at_dtype, exact.double(), op.terms(*args), eps)
        elif not torch.equal(got, at_dtype):
            raise AssertionError(f"counts differ from the reference's: {got} and {at_dtype}")


def devices() -> list[str]:
    """The kinds of device there are here."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def backends_of(op: Op) -> list[tuple[str, str]]:
    """(device, backend) for every way in which ``op`` can run here."""
    return [(d, backend) for d in devices() for of, backend in backends_here(d) if of is op]


def backends_here(device: str) -> Iterator[tuple[Op, str]]:
    """Every (op, backend) that can run on ``device`` on this machine, the reference included."""
    for op in OPS.values():
        for backend in BACKENDS:
            if op.why_not(backend, device) is None:
                yield op, backend


def differentiable_call(
    op: Op, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], list[torch.Tensor]]:
    """``f`` and its differentiable inputs such that ``f(*inputs)`` is ``op`` on ``args``."""
    slots = [i for i, name in enumerate(op.arguments) if name in op.differentiable]
    slots = [i for i in slots if args[i] is not None]
    inputs = [args[i].detach().clone().requires_grad_() for i in slots]

    def call(*tensors: torch.Tensor) -> Any:
        full = list(args)
        for slot, tensor in zip(slots, tensors, strict=True):
            full[slot] = tensor
        return getattr(torch.ops.neulig_fast, op.name).default(*full)

    return call, inputs

"""lerp_lists: two lists of tensors, one moved towards the other by a share of the way.

    theta_t = a_t + w (b_t - a_t)                  |w| < 1/2
    theta_t = b_t - (1 - w) (b_t - a_t)            else: w = 1 gives b_t itself

A step of an average of models: exponential with w = 1 - decay (Polyak and Juditsky 1992), of all
models so far with w = 1 / (n + 1) (SWA, arXiv 1803.05407). Unlike a blend with weights 1 - w and w,
which round, it leaves alone what is equal in both lists.

Numerics: a subtraction, a multiplication and an addition in fp32 (fp64 for fp64), one rounding at
the end: the same bits on every backend. To nearest, or stochastically for bf16 and fp16 with a
seed: an average in 2-byte types stands still once w (b - a) is less than half of the last place,
and moves on average as it should with random rounding. The word of element o of position t is that
of ``_rounding.words`` with segment t and output ``step``: a pure function of seed, step and place.

Traffic: 2 P values read and P written, P the elements of a list; 3 P flops.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from .._list_checks import has_memory
from .._registry import Op
from . import _arena, _lerp, _rounding
from ._lerp import Lists


def lerp_lists(
    starts: Lists,
    ends: Lists,
    weight: Tensor | float,
    rounding_seed: int | None = None,
    step: int = 0,
) -> list[Tensor]:
    """Move T tensors towards T others.

    Args:
        starts, ends: T contiguous tensors each (fp32, bf16, fp16 or fp64); position t has one shape
            and dtype in both. All are on one device.
        weight: the share of the way, a number, or a tensor () on the tensors' device.
        rounding_seed: rounds bf16 and fp16 stochastically; the same seed and ``step``, the same
            bits. None: to nearest.
        step: counts the calls with one seed, from 0 to 2**32 - 1.

    Returns:
        T new tensors. Not differentiable.

    Raises:
        ValueError: whatever does not fit, all of it listed.
    """
    first, second, weight = _lerp.opened("lerp_lists", starts, ends, weight, rounding_seed, step)
    return list(OP(list(first), list(second), weight, rounding_seed, step))


def lerp_lists_reference(
    starts: list[Tensor],
    ends: list[Tensor],
    weight: Tensor,
    rounding_seed: int | None = None,
    step: int = 0,
) -> list[Tensor]:
    """The formula in plain PyTorch."""
    results = []
    for t, (start, end) in enumerate(zip(starts, ends, strict=True)):
        acc = _checks.accumulation_dtype(start.dtype)
        w, a, b = weight.to(acc), start.to(acc), end.to(acc)
        way = b - a
        value = torch.where(w.abs() < 0.5, a + w * way, b - (1 - w) * way)
        if rounding_seed is None or start.dtype.itemsize != 2:
            results.append(value.to(start.dtype))
            continue
        random = _rounding.words(rounding_seed, value.flatten(), t, step)
        rounded = _rounding.stochastic(value.flatten(), start.dtype, random)
        results.append(rounded.view(start.shape))
    return results


def lerp_lists_fake(
    starts: list[Tensor],
    ends: list[Tensor],
    weight: Tensor,
    rounding_seed: int | None = None,
    step: int = 0,
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in starts]


def _run(backend: str) -> Any:
    def run(
        starts: list[Tensor], ends: list[Tensor], weight: Tensor, *rounding: Any
    ) -> Sequence[Tensor]:
        outputs = lerp_lists_fake(starts, ends, weight)
        tables = _lerp.tables(starts, ends, outputs)
        _lerp.launch(backend, weight, tables, *rounding)
        return outputs

    return run


def samples(device: torch.device | str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """A scalar, nothing, odd sizes and addresses, two dtypes; either formula; random rounding."""
    draw = _arena.Draw(device, dtype, seed=31)
    shapes: tuple[tuple[int, ...], ...] = ((), (5, 3), (0, 4), (17,), (1, 129), (33, 64))

    def weight(value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=device)

    def tensors() -> list[Tensor]:
        return [draw.normal(*shape) for shape in shapes]

    yield tensors(), tensors(), weight(0.001), None, 0
    yield tensors(), tensors(), weight(0.75), -5, 3
    odd = [[draw.normal(300)[7:136], draw.normal(2, 33).double()] for _ in range(2)]
    yield *odd, weight(0.3), 2**40 + 1, 2**32 - 1
    yield [draw.normal(40)], [draw.normal(40)], weight(-1.5), 0, 1


def why_not(
    starts: Sequence[Tensor], ends: Sequence[Tensor], weight: Tensor, *_: Any
) -> str | None:
    if not has_memory([weight, *starts, *ends]):
        return "tensors without memory of their own"
    return None


OP = Op(
    "lerp_lists",
    "(Tensor[] starts, Tensor[] ends, Tensor weight, SymInt? rounding_seed=None, SymInt step=0) "
    "-> Tensor[]",
    native="(Tensor weight, Tensor table, Tensor outputs, int base, int chunk, int chunks, "
    "ScalarType dtype, int? rounding_seed, int step) -> ()",
    reference=lerp_lists_reference,
    fake=lerp_lists_fake,
    faults=_lerp.faults,
    order={"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")},
    samples=samples,
    guard=_lerp.check_addresses,
    elementwise=True,
    not_offered={"cuda": "not written yet"},
)
OP.add_native("cpu", run=_run("cpu"), why_not=why_not)
OP.add_triton(run=_run("triton"), why_not=lambda module, *args: why_not(*args))

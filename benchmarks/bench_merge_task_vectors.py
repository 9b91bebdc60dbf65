"""merge_task_vectors: task arithmetic, and the merge stage of TIES, of three experts and a base.

Least traffic: experts and base read once, the merged row written once. The others restate the same
formulas in PyTorch, on whole tensors in fp32 as mergekit does with the stacked task vectors of a
tensor: eager, and by torch.compile. Bounds lie between possible magnitudes, so that the others need
not look at ties.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from neulig_fast import testing
from neulig_fast.ops._task_vectors import Call
from neulig_fast.ops.merge_task_vectors import OP

from . import harness, machine, selection
from .ceilings import ceilings
from .harness import Case, Provider
from .layers import draw, size

_BLOCK = 1 << 20  # columns of the oracle at a time
_SPREAD = 0.01  # of task vectors; a base's values are standard normal
_LOWER = 1.2815 * _SPREAD  # a fifth of a normal distribution is larger
_EXPERTS = 3


@dataclasses.dataclass(frozen=True)
class Setting:
    """N experts of P parameters, merged in one of two ways, on so many threads."""

    mode: str  # "arithmetic" or "ties"
    P: int
    threads: int = dataclasses.field(default_factory=lambda: machine.cores())

    @property
    def shape(self) -> str:
        return "toy" if self.P < 1 << 20 else f"{self.P >> 20} M"

    def call(self, dtype: torch.dtype, device: str) -> tuple[Call, Tensor]:
        """The op's arguments, and the (N + 1, P) matrix of the base and the experts."""
        rows = torch.empty(_EXPERTS + 1, self.P, dtype=dtype, device=device)
        base = draw(self.P, seed=1, dtype=torch.float32, device=device)
        rows[0] = base
        for i, row in enumerate(rows[1:]):
            offset = draw(self.P, seed=2 + i, dtype=torch.float32, device=device)
            row.copy_(base + _SPREAD * offset)
        weights = torch.tensor([0.5, 0.3, 0.4], device=device)
        if self.mode == "arithmetic":
            return Call(rows[1:], weights, rows[0]), rows
        ties = Call(
            *(rows[1:], weights, rows[0]),
            lower=torch.full((_EXPERTS,), _LOWER, device=device),
            lower_cut=torch.full((_EXPERTS,), self.P // 2, device=device),
            elect="weighted_sum",
            divide="weights",
        )
        return ties, rows


def settings(quick: bool, device: str) -> Iterator[Setting]:
    for mode in ("arithmetic", "ties"):
        if quick:
            yield Setting(mode, 4096)
            continue
        yield Setting(mode, 1 << 24)
        if device == "cpu":
            yield Setting(mode, 1 << 24, threads=1)


# -- other people's ways --------------------------------------------------------------------------


def arithmetic(params: Tensor, weights: Tensor, base: Tensor) -> Tensor:
    deltas = params.float() - base.float()
    return (base.float() + (weights[:, None] * deltas).sum(0)).to(base.dtype)


def ties(params: Tensor, weights: Tensor, base: Tensor, lower: Tensor) -> Tensor:
    deltas = params.float() - base.float()
    deltas = torch.where(deltas.abs() >= lower[:, None], deltas, 0.0)
    weighted = weights[:, None] * deltas
    majority = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted.sign() == majority
    divisor = (weights[:, None] * agrees).sum(0)
    divisor = torch.where(divisor == 0, 1.0, divisor)
    return (base.float() + (weighted * agrees).sum(0) / divisor).to(base.dtype)


# -- the case -------------------------------------------------------------------------------------


def check(call: Call) -> Callable[[Tensor], None]:
    """The tolerance rule against the fp64 reference, a block of columns at a time."""

    @functools.cache
    def expected(exact: bool) -> Tensor:
        parts = []
        for a in range(0, call.params.shape[1], _BLOCK):
            rows, base = call.params[:, a : a + _BLOCK], call.base[a : a + _BLOCK]
            part = tuple(call._replace(params=rows, base=base, start=a))
            parts.append(OP.reference(*(testing.cast(part, torch.float64) if exact else part)))
        return torch.cat(parts)

    def compare(result: Tensor) -> None:
        testing.assert_within_rule(result, expected(False), expected(True))

    return compare


def make_case(setting: Setting, dtype: torch.dtype, device: str) -> Case:
    call, rows = setting.call(dtype, device)
    theirs: Callable[..., Any] = arithmetic if setting.mode == "arithmetic" else ties
    args = (*call[:3], call.lower) if setting.mode == "ties" else call[:3]
    compiled = harness.compiled(theirs)
    row, wide = size(rows[0]), 4 * setting.P
    reference = 6 * _EXPERTS * wide  # terms, flags and copies of every expert in fp32
    ours = harness.ours(OP, device, lambda: OP(*call, None), (*call, None), reference, row)
    return Case(
        op="merge_task_vectors",
        mode=setting.mode,
        shape=setting.shape,
        dtype=dtype,
        device=device,
        threads=setting.threads,
        providers=[
            *ours,
            Provider("eager", lambda: theirs(*args), needs=row + 4 * _EXPERTS * wide),
            Provider("torch.compile", lambda: compiled(*args), needs=row),
            *ceilings(rows, setting.threads, write=True),
        ],
        check=check(call),
        traffic=size(rows) + row,
        flops=(4 if setting.mode == "arithmetic" else 14) * _EXPERTS * setting.P,
        resident=size(rows) + row,
        numbers={"N": _EXPERTS, "P": setting.P},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for setting in settings(quick, device):
            if selection.wanted(setting.shape, dtype, setting.threads, N=_EXPERTS):
                yield make_case(setting, dtype, device)


if __name__ == "__main__":
    harness.main("merge_task_vectors", cases)

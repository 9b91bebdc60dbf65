"""neulig_loss_backward: the closed-form gradients of the Portland, given the CoopVecs.

The other: torch.compile of our reference. What autograd needs for the same gradients, forward
included, is in bench_neulig_loss.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from neulig_fast import testing
from neulig_fast.ops.neulig_loss import neulig_loss_reference
from neulig_fast.ops.neulig_loss_backward import OP, neulig_loss_backward_reference

from . import harness, machine
from .bench_neulig_loss import arguments, shapes
from .harness import Case, Provider

_NEEDS = [False, True, True, False, False, False]  # the Portland's weight and bias, as in training


def backward_arguments(sizes: tuple[int, ...], device: str) -> tuple[Any, ...]:
    z, W, c, H, h, t, A, *settings = arguments(sizes, device)
    w = neulig_loss_reference(z, W, c, H, h, t, A, *settings)[3]
    one = torch.ones((), device=device)
    return (one, None, None, None, w, z, W, H, h, t, A, *settings, _NEEDS)


def make_case(sizes: tuple[int, ...], device: str) -> Case:
    args = backward_arguments(sizes, device)
    compiled = harness.compiled(neulig_loss_backward_reference)
    op = torch.ops.neulig_fast.neulig_loss_backward.default
    return Case(
        op="neulig_loss_backward",
        mode="bwd",
        shape="B{} N{} D{} C{}".format(*sizes),
        dtype=torch.float32,
        device=device,
        threads=machine.cores(),
        providers=[
            *harness.ours(OP, device, lambda: op(*args), args),
            Provider("torch.compile", lambda: compiled(*args)),
        ],
        check=lambda result: testing.assert_op_close(OP, result, args),
        traffic=sum(a.nbytes for a in args if isinstance(a, Tensor)),
        numbers={"N": sizes[1]},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for sizes in [(8, 3, 16, 6)] if quick else shapes():
        yield make_case(sizes, device)


if __name__ == "__main__":
    harness.main("neulig_loss_backward", cases)

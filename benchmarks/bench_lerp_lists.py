"""lerp_lists: a step of an average of ViT-B/32's tensors, in place, where they are.

Least traffic: both lists read once, one written once. Ours: plain lists, checked in every call. The
others: ``torch._foreach_lerp_``, as torch's AveragedModel has it, and a loop of ``lerp_``.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.lerp_lists import OP

from . import harness
from .bench_blend import Setting
from .ceilings import ceilings
from .harness import Case, Provider
from .shapes import TOY, VIT_B_32, make_experts

_WEIGHT = 1e-3  # a decay of 0.999


def settings(quick: bool) -> Iterator[Setting]:
    for dtype in (torch.float32, torch.bfloat16):
        yield Setting(TOY if quick else VIT_B_32, dtype, 2)


def check(averages: list[Tensor], models: list[Tensor], before: list[Tensor]) -> None:
    """The tolerance rule for what a call left in ``averages``."""
    for average, start, end in zip(averages, before, models, strict=True):
        exact = torch.lerp(start.double(), end.double(), _WEIGHT)
        testing.assert_within_rule(average, exact.to(average.dtype), exact)


def make_case(setting: Setting, device: str) -> Case:
    experts = make_experts(2, setting.segments, setting.dtype, device)
    averages, models = (list(state.values()) for state in experts.state_dicts)
    before = [average.clone() for average in averages]
    weight = torch.tensor(_WEIGHT, device=device)

    @contextlib.contextmanager
    def anew() -> Iterator[None]:
        torch._foreach_copy_(averages, before)
        yield

    def loop() -> None:
        for average, model in zip(averages, models, strict=True):
            average.lerp_(model, _WEIGHT)

    def foreach() -> None:
        torch._foreach_lerp_(averages, models, _WEIGHT)

    ours = harness.ours(
        OP,
        device,
        lambda: neulig_fast.lerp_lists_(averages, models, weight),
        (averages, models, weight, None, 0),
        3 * max(tensor.numel() for tensor in models) * 4 + experts.params[0].nbytes,
    )
    values = sum(segment.length for segment in setting.segments)
    return Case(
        op="lerp_lists",
        mode="in place",
        shape=setting.shape.name,
        dtype=setting.dtype,
        device=device,
        threads=setting.threads,
        providers=[
            *(dataclasses.replace(provider, within=anew) for provider in ours),
            Provider("torch._foreach", foreach, within=anew),
            Provider("python loop", loop, within=anew),
            *ceilings(experts.params, setting.threads, write=True),
        ],
        check=lambda _: check(averages, models, before),
        traffic=3 * values * setting.dtype.itemsize,
        flops=3 * values,
        resident=setting.resident(5),
        numbers={"N": 2},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for setting in settings(quick):
        if setting.wanted("lerp_lists", device, 4):
            yield make_case(setting, device)


if __name__ == "__main__":
    harness.main("lerp_lists", cases)

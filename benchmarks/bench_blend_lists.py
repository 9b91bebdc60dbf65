"""blend_lists, forward: a blend of N lists of tensors of ViT-B/32's size, where they are.

Least traffic: N experts read once, one written once. Ours: prepared lists, plain lists (checked in
every call), and into given tensors. The others: a Python loop over the tensors, stack + einsum per
tensor, ``torch._foreach_*`` and FusionBench. torch.compile takes long over hundreds of tensors and
is left out; bench_blend has it on one flat matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import neulig_fast
from neulig_fast.ops.blend_lists import OP

from . import fusionbench, harness
from .bench_blend import Setting, check, draw_weights, foreach, grid, python_loop, stack_einsum
from .ceilings import ceilings
from .harness import Case, Provider
from .shapes import TOY, Experts, make_experts


def settings(quick: bool, device: str) -> Iterator[Setting]:
    for dtype in (torch.float32, torch.bfloat16):
        if quick:
            yield Setting(TOY, dtype, 3, per_tensor=dtype == torch.bfloat16)
        else:
            yield from grid(dtype, device)


def our_providers(weights: Tensor, experts: Experts) -> list[Provider]:
    lists = [list(state.values()) for state in experts.state_dicts]
    prepared = neulig_fast.TensorLists(lists)
    outputs = [torch.empty_like(tensor) for tensor in lists[0]]
    targets = neulig_fast.TensorLists([outputs])
    row = experts.params[0].nbytes
    sums = 3 * max(tensor.numel() for tensor in outputs) * 4  # of the reference, in fp32

    def into() -> list[Tensor]:
        neulig_fast.blend_lists_(targets, weights, prepared)
        return outputs

    def ours(run: Callable[[], Any], needs: int) -> list[Provider]:
        args = (weights, prepared.flat, None)
        return harness.ours(OP, weights.device.type, run, args, sums + row, needs)

    found = ours(lambda: neulig_fast.blend_lists(weights, prepared), row)
    for name, run, needs in (
        ("unprepared", lambda: neulig_fast.blend_lists(weights, lists), row),
        ("into given tensors", into, 0),
    ):
        found += [
            Provider(f"{p.name}, {name}", p.run, p.side, needs=p.needs)
            for p in ours(run, needs)
            if p.name != "neulig_fast/torch"
        ]
    return found


def providers(weights: Tensor, experts: Experts) -> list[Provider]:
    params, states = experts.params, experts.state_dicts
    tensors = [list(state.values()) for state in states]
    rows, cast = weights.reshape(-1, len(states)), weights.to(params.dtype)
    values, cast = rows.tolist(), cast.reshape(-1, len(states))
    out, largest = params[0].nbytes, max(s.length for s in experts.segments) * params.itemsize
    stacked = out + 2 * len(states) * largest
    products = out * (weights.ndim - 1)  # of per-tensor weights
    return [
        *our_providers(weights, experts),
        Provider("python loop", lambda: python_loop(values, states), needs=out + 2 * largest),
        Provider("stack + einsum", lambda: stack_einsum(cast, states), needs=stacked),
        Provider("torch._foreach", lambda: foreach(values, tensors), needs=out + products),
        *fusionbench.blend_providers(values, experts),
    ]


def make_case(setting: Setting, device: str) -> Case:
    N, per_tensor, segments = setting.N, setting.per_tensor, setting.segments
    experts = make_experts(N, segments, setting.dtype, device)
    weights = draw_weights(N, None, len(segments) if per_tensor else None, device)
    found = providers(weights, experts)
    values = sum(segment.length for segment in segments)  # less than a row: no padding
    return Case(
        op="blend_lists",
        mode="fwd",
        shape=setting.shape.name,
        dtype=setting.dtype,
        device=device,
        threads=setting.threads,
        providers=[*found, *ceilings(experts.params, setting.threads, write=True)],
        check=check(weights, experts, per_tensor),
        traffic=(N + 1) * values * setting.dtype.itemsize,
        flops=2 * N * values,
        # a row that "into given tensors" writes, and one of the ceilings
        resident=setting.resident(N + 2) + sum(p.holds for p in found),
        numbers=setting.numbers,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for setting in settings(quick, device):
        if setting.wanted("blend_lists", device, setting.N + 3):
            yield make_case(setting, device)


if __name__ == "__main__":
    harness.main("blend_lists", cases)

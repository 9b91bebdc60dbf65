"""blend_lists, forward: the tensors of experts of ViT-B/32's size, each in memory of its own.

Least traffic: N experts read once, one written once. Ours: prepared lists, plain lists (checked in
every call), and into given tensors. The others: a Python loop over the tensors, stack + einsum per
tensor and ``torch._foreach_*``. torch.compile takes long over hundreds of tensors and is left out;
bench_blend has it on one flat matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import harness
import machine
import torch
from bench_blend import draw_weights, foreach, python_loop, stack_einsum
from ceilings import ceilings
from harness import Case, Provider
from shapes import TOY, VIT_B_32, Experts, layout, make_experts
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.blend_lists import OP, blend_lists_reference

_CHECKED = 1 << 16  # elements of every tensor that are compared with the oracle

Setting = tuple[int, bool, int]  # N, per-tensor weights?, threads


def settings(quick: bool, device: str) -> Iterator[tuple[torch.dtype, Setting]]:
    many = machine.cores()
    for dtype in (torch.float32, torch.bfloat16):
        if quick:
            yield dtype, (3, dtype == torch.bfloat16, many)
            continue
        yield from ((dtype, (N, False, many)) for N in (16, 8, 5, 3, 2))
        yield dtype, (5, True, many)
        if device == "cpu" and many > 1:
            yield dtype, (5, False, 1)


def check(weights: Tensor, lists: list[list[Tensor]]) -> Callable[[Any], None]:
    """Compares T tensors with the fp64 reference on the first elements of every tensor."""
    heads = [tensor.reshape(-1)[:_CHECKED] for tensors in lists for tensor in tensors]

    @functools.cache
    def expected(dtype: torch.dtype) -> Tensor:
        experts = [head.to(dtype) for head in heads]
        return torch.cat(blend_lists_reference(weights.double(), experts))

    def compare(result: Any) -> None:
        got = torch.cat([tensor.reshape(-1)[:_CHECKED] for tensor in result])
        testing.assert_within_rule(got, expected(got.dtype), expected(torch.float64))

    return compare


def providers(weights: Tensor, experts: Experts) -> list[Provider]:
    states = experts.state_dicts
    lists = [list(state.values()) for state in states]
    device, out = experts.params.device.type, experts.params[0].nbytes
    prepared = neulig_fast.TensorLists(lists)
    outputs = [torch.empty_like(tensor) for tensor in lists[0]]
    targets = neulig_fast.TensorLists([outputs])
    args = (weights, prepared.flat, None)
    sums = 3 * max(tensor.numel() for tensor in outputs) * 4 + out  # of the reference

    def into() -> list[Tensor]:
        neulig_fast.blend_lists_(targets, weights, prepared)
        return outputs

    found = harness.ours(OP, device, lambda: neulig_fast.blend_lists(weights, prepared), args, sums)
    native = [p for p in found if not p.name.endswith("/torch")]
    for name, run in (
        ("unprepared", lambda: neulig_fast.blend_lists(weights, lists)),
        ("into given tensors", into),
    ):
        for provider in native:
            backend = provider.name.rpartition("/")[2]
            call = neulig_fast.use_backend(backend)(run)
            found.append(Provider(f"{provider.name}, {name}", call, side="ours", needs=out))
    grid = weights.reshape(-1, len(lists)).tolist()
    rows = weights.to(experts.params.dtype).reshape(-1, len(lists))
    return [
        *found,
        Provider("python loop", lambda: python_loop(grid, states), needs=out),
        Provider("stack + einsum", lambda: stack_einsum(rows, states), needs=out),
        Provider("torch._foreach", lambda: foreach(grid, lists), needs=out),
    ]


def make_case(size: dict, dtype: torch.dtype, setting: Setting, device: str) -> Case | None:
    N, per_tensor, threads = setting
    segments = layout(size, dtype)
    resident = (N + 3) * segments.width * dtype.itemsize
    if resident > machine.memory(device):
        harness.say(f"blend_lists N={N} {dtype} skipped: it needs {resident / 1e9:.0f} GB")
        return None
    experts = make_experts(N, segments, dtype, device)
    weights = draw_weights(N, None, len(segments) if per_tensor else None, device)
    lists = [list(state.values()) for state in experts.state_dicts]
    return Case(
        op="blend_lists",
        mode="fwd",
        shape="ViT-B-32" if size is VIT_B_32 else "toy",
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[
            *providers(weights, experts),
            *ceilings(experts.params, threads, write=True),
        ],
        check=check(weights, lists),
        traffic=(N + 1) * experts.params[0].nbytes,
        resident=resident,
        numbers={"N": N, "K": 1, "P": segments.width, "S": len(segments) if per_tensor else 1},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype, setting in settings(quick, device):
        case = make_case(TOY if quick else VIT_B_32, dtype, setting, device)
        if case is not None:
            yield case
            del case


if __name__ == "__main__":
    harness.main("blend_lists", cases)

"""blend_lists_weight_grad: the coefficients' gradient, through autograd (fwd+bwd) and alone (bwd).

Least traffic of bwd: N experts and one incoming gradient, read once; fwd+bwd adds the blend. The
others: mul + sum, ``torch.dot`` and stack + mv per tensor; and a Python loop under autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import harness
import machine
import torch
from bench_blend import draw_weights
from bench_blend_weight_grad import dots, loop_autograd, mul_sum, stack_mv
from ceilings import ceilings
from harness import Case, Provider
from shapes import TOY, VIT_B_32, Experts, layout, make_experts, row_views
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.blend_lists_weight_grad import OP

_BLOCK = 1 << 20  # elements of the fp64 oracle at a time

Setting = tuple[str, int, int]  # mode, N, threads


def settings(quick: bool, device: str) -> Iterator[tuple[torch.dtype, Setting]]:
    many = machine.cores()
    for dtype in (torch.float32, torch.bfloat16):
        if quick:
            yield dtype, ("fwd+bwd" if dtype == torch.float32 else "bwd", 3, many)
            continue
        yield from ((dtype, ("bwd", N, many)) for N in (16, 8, 5, 3, 2))
        yield dtype, ("fwd+bwd", 5, many)
        if device == "cpu" and many > 1:
            yield dtype, ("bwd", 5, 1)


def check(grad: Tensor, experts: Experts) -> Callable[[Tensor], None]:
    """Compares a result, summed over tensors where it has one row each, with fp64 sums."""

    @functools.cache
    def expected(dtype: torch.dtype) -> Tensor:
        total = grad.new_zeros(len(experts.params), dtype=torch.float64)
        for start in range(0, grad.numel(), _BLOCK):
            theta = experts.params[:, start : start + _BLOCK].to(dtype)
            g = grad[start : start + _BLOCK].to(dtype)
            total += torch.stack([(g * row).sum() for row in theta]).double()
        return total

    def compare(result: Tensor) -> None:
        got = result.float()
        got = got.sum(0) if got.ndim == 2 else got
        working = expected(torch.float32).float()
        testing.assert_within_rule(got, working, expected(torch.float64), grad.numel())

    return compare


def backward_providers(grad: Tensor, experts: Experts) -> list[Provider]:
    states, device = experts.state_dicts, experts.params.device.type
    row = row_views(grad, experts.segments)
    flat = [tensor for state in states for tensor in state.values()]
    weights = draw_weights(len(states), None, None, device)
    args = (weights, list(row.values()), flat)
    return [
        *harness.ours(OP, device, lambda: OP(*args), args, 2 * grad.numel() * 4),
        Provider("mul + sum per tensor", lambda: mul_sum(row, states)),
        Provider("torch.dot per tensor", lambda: dots(row, states)),
        Provider("stack + mv per tensor", lambda: stack_mv(row, states)),
    ]


def autograd_providers(grad: Tensor, experts: Experts) -> list[Provider]:
    states, device = experts.state_dicts, experts.params.device.type
    row = row_views(grad, experts.segments)
    prepared = neulig_fast.TensorLists(list(state.values()) for state in states)
    weights = draw_weights(len(states), None, None, device)
    grads = list(row.values())

    def ours() -> Tensor:
        w = weights.detach().requires_grad_()
        return torch.autograd.grad(neulig_fast.blend_lists(w, prepared), w, grads)[0]

    needs = 3 * experts.params.nbytes
    return [
        *harness.ours(OP, device, ours, (weights, grads, prepared.flat), needs),
        Provider("python loop", lambda: loop_autograd(weights, states, row), needs=needs),
    ]


def make_case(size: dict, dtype: torch.dtype, setting: Setting, device: str) -> Case | None:
    mode, N, threads = setting
    segments = layout(size, dtype)
    resident = (N + 3) * segments.width * dtype.itemsize
    if resident > machine.memory(device):
        harness.say(f"blend_lists_weight_grad N={N} {dtype} skipped: {resident / 1e9:.0f} GB")
        return None
    experts = make_experts(N, segments, dtype, device)
    grad = make_experts(1, segments, dtype, device).params[0]
    both = mode == "fwd+bwd"
    found = autograd_providers(grad, experts) if both else backward_providers(grad, experts)
    return Case(
        op="blend_lists_weight_grad",
        mode=mode,
        shape="ViT-B-32" if size is VIT_B_32 else "toy",
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[*found, *ceilings(experts.params, threads, write=both)],
        check=check(grad, experts),
        traffic=(N + 1) * (2 if both else 1) * experts.params[0].nbytes,
        resident=resident,
        numbers={"N": N, "K": 1, "P": segments.width, "S": 1},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype, setting in settings(quick, device):
        case = make_case(TOY if quick else VIT_B_32, dtype, setting, device)
        if case is not None:
            yield case
            del case


if __name__ == "__main__":
    harness.main("blend_lists_weight_grad", cases)

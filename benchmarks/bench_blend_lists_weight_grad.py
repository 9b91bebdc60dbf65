"""blend_lists_weight_grad: the coefficients' gradient, alone (bwd) and through autograd (fwd+bwd).

Least traffic of bwd: N experts and one incoming gradient, read once; fwd+bwd adds the blend. Ours:
the backward pass of a blend of prepared lists, and the op on plain tensors. The others: mul + sum,
``torch.dot`` and stack + mv per tensor; in fwd+bwd a Python loop under autograd, for bf16
also in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import neulig_fast
from neulig_fast.ops.blend_lists_weight_grad import OP

from . import harness
from .bench_blend import draw_weights, grid
from .bench_blend_weight_grad import (
    Setting,
    States,
    check,
    dots,
    loop_autograd,
    mul_sum,
    stack_mv,
)
from .ceilings import ceilings
from .harness import Case, Provider
from .shapes import TOY, VIT_B_32, Experts, make_experts, row_views


def settings(quick: bool, device: str) -> Iterator[Setting]:
    for dtype in (torch.float32, torch.bfloat16):
        if quick:
            yield Setting(TOY, dtype, 3, per_tensor=dtype == torch.bfloat16)
            yield Setting(TOY, dtype, 2, mode="fwd+bwd")
            continue
        yield from grid(dtype, device, Setting)
        yield Setting(VIT_B_32, dtype, 5, mode="fwd+bwd")


def loop_in_fp32(weights: Tensor, states: States, grad: dict[str, Tensor]) -> Tensor:
    # sums of bf16 products in bf16, as loop_autograd's, are wrong in the second digit
    w = weights.detach().requires_grad_()
    merged = [
        sum(w[i] * state[key].float() for i, state in enumerate(states)).to(g.dtype)
        for key, g in grad.items()
    ]
    return torch.autograd.grad(merged, w, list(grad.values()))[0]


def backward_providers(weights: Tensor, grad: Tensor, experts: Experts) -> list[Provider]:
    states, device = experts.state_dicts, experts.params.device.type
    row = row_views(grad, experts.segments)
    prepared = neulig_fast.TensorLists(state.values() for state in states)
    args = (weights, list(row.values()), prepared.flat)
    largest = max(s.length for s in experts.segments)
    products = 3 * 4 * largest  # of the reference, in fp32
    w = weights.detach().requires_grad_()
    merged = neulig_fast.blend_lists(w, prepared)

    def through_autograd() -> Tensor:
        return torch.autograd.grad(merged, w, args[1], retain_graph=True)[0]

    plain = harness.ours(OP, device, lambda: OP(*args), args, products)
    return [
        *harness.ours(OP, device, through_autograd, args, products),
        *(
            Provider(f"{p.name}, unprepared", p.run, p.side, needs=p.needs)
            for p in plain
            if p.name != "neulig_fast/torch"
        ),
        Provider("mul + sum per tensor", lambda: mul_sum(row, states), needs=products),
        Provider("torch.dot per tensor", lambda: dots(row, states)),
        Provider(
            "stack + mv per tensor",
            lambda: stack_mv(row, states),
            needs=len(states) * largest * grad.itemsize,
        ),
    ]


def autograd_providers(weights: Tensor, grad: Tensor, experts: Experts) -> list[Provider]:
    states, device = experts.state_dicts, experts.params.device.type
    row = row_views(grad, experts.segments)
    grads = list(row.values())
    prepared = neulig_fast.TensorLists(state.values() for state in states)

    def ours() -> Tensor:
        w = weights.detach().requires_grad_()
        return torch.autograd.grad(neulig_fast.blend_lists(w, prepared), w, grads)[0]

    out, whole = grad.nbytes, 4 * grad.numel()  # a row, and one in fp32
    loop, wide = 3 * experts.params.nbytes, 3 * len(states) * whole
    found = [
        *harness.ours(OP, device, ours, (weights, grads, prepared.flat), 4 * whole, out),
        Provider("python loop", lambda: loop_autograd(weights, states, row), needs=loop),
    ]
    if grad.dtype != torch.float32:
        run = functools.partial(loop_in_fp32, weights, states, row)
        found.append(Provider("python loop in fp32", run, needs=wide))
    return found


def make_case(setting: Setting, device: str) -> Case:
    N, both, segments = setting.N, setting.mode == "fwd+bwd", setting.segments
    experts = make_experts(N, segments, setting.dtype, device)
    grad = make_experts(1, segments, setting.dtype, device).params[0]
    weights = draw_weights(N, None, len(segments) if setting.per_tensor else None, device)
    providers = autograd_providers if both else backward_providers
    values = sum(segment.length for segment in segments)  # less than a row: no padding
    return Case(
        op="blend_lists_weight_grad",
        mode=setting.mode,
        shape=setting.shape.name,
        dtype=setting.dtype,
        device=device,
        threads=setting.threads,
        providers=[
            *providers(weights, grad, experts),
            *ceilings(experts.params, setting.threads, write=both),
        ],
        check=check(grad, experts, setting.per_tensor, torch.Size()),
        traffic=(2 if both else 1) * (N + 1) * values * setting.dtype.itemsize,
        flops=(4 if both else 2) * N * values,
        resident=setting.resident(N + 3),  # the gradient, a merged row, one of the ceilings
        numbers=setting.numbers,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for setting in settings(quick, device):
        if setting.wanted("blend_lists_weight_grad", device, setting.N + 3):
            yield make_case(setting, device)


if __name__ == "__main__":
    harness.main("blend_lists_weight_grad", cases)

"""blend_weight_grad: the coefficients' gradient, alone (bwd) and through autograd (fwd+bwd).

Least traffic of bwd: N experts and K incoming rows, read once. The others: mul + sum and
``torch.dot`` per tensor and expert, stack + mv per tensor, a matrix product on the flat arena,
torch.compile of our reference. fwd+bwd adds the blend; the others there: a Python loop over the
tensors and torch.compile of our reference, both under autograd.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise

import harness
import machine
import torch
from bench_blend import draw_weights
from ceilings import ceilings
from harness import Case, Provider
from shapes import TOY, VIT_B_32, Experts, layout, make_experts, row_views
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.blend import blend_reference
from neulig_fast.ops.blend_weight_grad import OP, blend_weight_grad_reference

_BLOCK = 1 << 20  # columns of the fp64 oracle at a time

Setting = tuple[str, int, int | None, bool, int]  # mode, N, K, per tensor?, threads


def settings(quick: bool, device: str) -> Iterator[tuple[torch.dtype, Setting]]:
    many = machine.cores()
    for dtype in (torch.float32, torch.bfloat16):
        if quick:
            yield dtype, ("bwd", 3, None, dtype == torch.bfloat16, many)
            yield dtype, ("fwd+bwd", 2, None, False, 1)
            continue
        yield from ((dtype, ("bwd", N, None, False, many)) for N in (16, 8, 5, 3, 2))
        if dtype == torch.float32:
            yield dtype, ("bwd", 5, 8, False, many)
        yield dtype, ("bwd", 5, None, True, many)
        yield dtype, ("fwd+bwd", 5, None, False, many)
        if device == "cpu" and many > 1:
            yield dtype, ("bwd", 5, None, False, 1)


# -- other people's ways: one dot product per tensor and expert -----------------------------------

States = list[dict[str, Tensor]]


def mul_sum(grad: dict[str, Tensor], states: States) -> Tensor:
    # in fp32: sums of bf16 products in bf16 are wrong in the second digit
    return _table(grad, states, lambda g, theta: (g.float() * theta.float()).sum())


def dots(grad: dict[str, Tensor], states: States) -> Tensor:
    return _table(grad, states, lambda g, theta: torch.dot(g.view(-1), theta.view(-1)))


def _table(
    grad: dict[str, Tensor], states: States, dot: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """(S, N) of ``dot(grad, theta)`` for every tensor and expert."""
    return torch.stack([dot(grad[key], state[key]) for key in grad for state in states]).view(
        len(grad), len(states)
    )


def stack_mv(grad: dict[str, Tensor], states: States) -> Tensor:
    return torch.stack(
        [torch.stack([s[key].view(-1) for s in states]) @ g.view(-1) for key, g in grad.items()]
    )


def loop_autograd(weights: Tensor, states: States, grad: dict[str, Tensor]) -> Tensor:
    w = weights.detach().requires_grad_()
    merged = [sum(w[i] * s[key] for i, s in enumerate(states)) for key in grad]
    return torch.autograd.grad(merged, w, list(grad.values()))[0]


def op_autograd(
    blend: Callable[[Tensor, Tensor], Tensor], weights: Tensor, params: Tensor, grad: Tensor
) -> Tensor:
    w = weights.detach().requires_grad_()
    return torch.autograd.grad(blend(w, params), w, grad)[0]


# -- the case -------------------------------------------------------------------------------------


def check(
    grad: Tensor, experts: Experts, per_tensor: bool, lead: torch.Size
) -> Callable[[Tensor], None]:
    """Compares a result, summed over tensors where it has one row each, with the fp64 reference."""
    bounds = experts.segments.bounds.tolist()
    ranges = list(pairwise(bounds if per_tensor else [*range(0, bounds[-1], _BLOCK), bounds[-1]]))

    @functools.cache
    def expected(dtype: torch.dtype) -> Tensor:
        parts = [
            blend_weight_grad_reference(
                grad[..., a:b].to(dtype), experts.params[:, a:b].to(dtype)
            ).double()
            for a, b in ranges
        ]
        whole = torch.stack(parts, -2)
        return whole if per_tensor else whole.sum(-2)

    def compare(result: Tensor) -> None:
        got = result.float()
        shape = (*lead, len(experts.segments), experts.params.shape[0])
        if not per_tensor and got.shape == shape:
            got = got.sum(-2)
        working = expected(experts.params.dtype).float()
        testing.assert_within_rule(got, working, expected(torch.float64), bounds[-1])

    return compare


def _each(function: Callable[..., Tensor], grads: list, states: States, K: int | None) -> Callable:
    if K is None:
        return lambda: function(grads[0], states)
    return lambda: torch.stack([function(grad, states) for grad in grads])


def backward_providers(
    grad: Tensor, experts: Experts, K: int | None, per_tensor: bool
) -> list[Provider]:
    params, states = experts.params, experts.state_dicts
    segments = experts.segments.bounds_on(params.device) if per_tensor else None
    rows = [row_views(row, experts.segments) for row in grad.view(-1, grad.shape[-1])]
    args = (grad, params, segments)
    products = 2 * (K or 1) * params.shape[1] * 4  # of the reference, whole rows in fp32
    device = params.device.type
    found = harness.ours(OP, device, lambda: neulig_fast.blend_weight_grad(*args), args, products)
    for name, function in (
        ("mul + sum per tensor", mul_sum),
        ("torch.dot per tensor", dots),
        ("stack + mv per tensor", stack_mv),
    ):
        found.append(Provider(name, _each(function, rows, states, K)))
    if per_tensor:
        return found
    flat = harness.compiled(blend_weight_grad_reference)
    return [
        *found,
        Provider("flat matmul", lambda: grad @ params.T),
        Provider("torch.compile", lambda: flat(grad, params)),
    ]


def autograd_providers(grad: Tensor, experts: Experts) -> list[Provider]:
    params, states = experts.params, experts.state_dicts
    weights = draw_weights(len(params), None, None, params.device.type)
    row = row_views(grad, experts.segments)
    flat = harness.compiled(blend_reference)

    def ours() -> Tensor:
        return op_autograd(neulig_fast.blend, weights, params, grad)

    return [
        *harness.ours(OP, params.device.type, ours, (grad, params, None)),
        Provider(
            "python loop", lambda: loop_autograd(weights, states, row), needs=3 * params.nbytes
        ),
        Provider("torch.compile", lambda: op_autograd(flat, weights, params, grad)),
    ]


def make_case(size: dict, dtype: torch.dtype, setting: Setting, device: str) -> Case | None:
    mode, N, K, per_tensor, threads = setting
    segments = layout(size, dtype)
    resident = (N + (K or 1) + 2) * segments.width * dtype.itemsize
    if resident > machine.memory(device):
        harness.say(f"blend_weight_grad N={N} {dtype} skipped: it needs {resident / 1e9:.0f} GB")
        return None
    experts = make_experts(N, segments, dtype, device)
    grad = make_experts(K or 1, segments, dtype, device).params
    grad = grad[0] if K is None else grad
    both = mode == "fwd+bwd"
    found = (
        autograd_providers(grad, experts)
        if both
        else backward_providers(grad, experts, K, per_tensor)
    )
    row = experts.params[0].nbytes
    return Case(
        op="blend_weight_grad",
        mode=mode,
        shape="ViT-B-32" if size is VIT_B_32 else "toy",
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[*found, *ceilings(experts.params, threads, write=both)],
        check=check(grad, experts, per_tensor, grad.shape[:-1]),
        traffic=(N + (K or 1) + (N + 1 if both else 0)) * row,
        resident=resident,
        numbers={"N": N, "K": K or 1, "P": segments.width, "S": len(segments) if per_tensor else 1},
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype, setting in settings(quick, device):
        case = make_case(TOY if quick else VIT_B_32, dtype, setting, device)
        if case is not None:
            yield case
            del case


if __name__ == "__main__":
    harness.main("blend_weight_grad", cases)

"""blend_weight_grad: the coefficients' gradient, alone (bwd) and through autograd (fwd+bwd).

Least traffic of bwd: N experts and K incoming rows, read once. The others: mul + sum and
``torch.dot`` per tensor and expert, stack + mv per tensor, a matrix product on the flat arena,
torch.compile of our reference. fwd+bwd adds the blend; the others there: a Python loop over the
tensors and torch.compile of our reference, both under autograd.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.blend import blend_reference
from neulig_fast.ops.blend_weight_grad import OP, blend_weight_grad_reference

from . import bench_blend, harness
from .bench_blend import draw_weights, grid
from .ceilings import ceilings
from .harness import Case, Provider
from .shapes import TOY, VIT_B_32, Experts, make_experts, row_views

_BLOCK = 1 << 20  # columns of the fp64 oracle at a time


@dataclasses.dataclass(frozen=True)
class Setting(bench_blend.Setting):
    """The same, and what is measured: the gradient alone, or the blend and its gradient."""

    mode: str = "bwd"


def settings(quick: bool, device: str) -> Iterator[Setting]:
    for dtype in (torch.float32, torch.bfloat16):
        if quick:
            yield Setting(TOY, dtype, 3, per_tensor=dtype == torch.bfloat16)
            yield Setting(TOY, dtype, 2, threads=1, mode="fwd+bwd")
            continue
        yield from grid(dtype, device, Setting)
        yield Setting(VIT_B_32, dtype, 5, 8)
        yield Setting(VIT_B_32, dtype, 5, mode="fwd+bwd")


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
    largest = max(s.length for s in experts.segments)
    for name, function, needs in (
        ("mul + sum per tensor", mul_sum, 3 * 4 * largest),
        ("torch.dot per tensor", dots, 0),
        ("stack + mv per tensor", stack_mv, len(params) * largest * params.itemsize),
    ):
        found.append(Provider(name, _each(function, rows, states, K), needs=needs))
    if per_tensor:
        return found
    flat = harness.compiled(blend_weight_grad_reference)
    return [
        *found,
        # A product in bf16 may first copy the arena into an order it prefers.
        Provider("flat matmul", lambda: grad @ params.T, needs=params.nbytes),
        Provider("torch.compile", lambda: flat(grad, params)),
    ]


def autograd_providers(grad: Tensor, experts: Experts) -> list[Provider]:
    params, states = experts.params, experts.state_dicts
    weights = draw_weights(len(params), None, None, params.device.type)
    row = row_views(grad, experts.segments)
    flat = harness.compiled(blend_reference)

    def ours() -> Tensor:
        return op_autograd(neulig_fast.blend, weights, params, grad)

    out, whole = grad.nbytes, 4 * grad.numel()  # a row, and one in fp32
    return [
        *harness.ours(OP, params.device.type, ours, (grad, params, None), 4 * whole, out),
        Provider(
            "python loop", lambda: loop_autograd(weights, states, row), needs=3 * params.nbytes
        ),
        Provider(
            "torch.compile", lambda: op_autograd(flat, weights, params, grad), needs=3 * whole
        ),
    ]


def make_case(setting: Setting, device: str) -> Case:
    N, K, both = setting.N, setting.K, setting.mode == "fwd+bwd"
    segments, columns = setting.segments, setting.segments.width
    experts = make_experts(N, segments, setting.dtype, device)
    grad = make_experts(K or 1, segments, setting.dtype, device).params
    grad = grad[0] if K is None else grad
    found = (
        autograd_providers(grad, experts)
        if both
        else backward_providers(grad, experts, K, setting.per_tensor)
    )
    return Case(
        op="blend_weight_grad",
        mode=setting.mode,
        shape=setting.shape.name,
        dtype=setting.dtype,
        device=device,
        threads=setting.threads,
        providers=[*found, *ceilings(experts.params, setting.threads, write=both)],
        check=check(grad, experts, setting.per_tensor, grad.shape[:-1]),
        traffic=setting.resident(N + (K or 1) + (N + 1 if both else 0)),
        flops=(4 if both else 2) * N * (K or 1) * columns,
        resident=setting.resident(N + (K or 1) + 1),
        numbers=setting.numbers,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for setting in settings(quick, device):
        if setting.wanted("blend_weight_grad", device, setting.N + (setting.K or 1) + 1):
            yield make_case(setting, device)


if __name__ == "__main__":
    harness.main("blend_weight_grad", cases)

"""blend, forward: experts of ViT-B/32's size into one merged model, or K of them.

Least traffic: N experts read once, K outputs written once. The others: a Python loop over the
tensors, stack + einsum per tensor, a matrix product on the flat arena, ``torch._foreach_*``,
torch.compile of our reference, and the way of the published evaluation, once per test batch: copy
and flatten every expert, stack, add up, split.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import harness
import machine
import torch
from ceilings import ceilings
from harness import Case, Provider
from shapes import TOY, VIT_B_32, Experts, layout, make_experts
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.blend import OP, blend_reference

_CHECKED = 1 << 16  # columns of every tensor that are compared with the oracle

Setting = tuple[int, int | None, bool, int]  # N, K, per-tensor weights?, threads


def settings(quick: bool, device: str) -> Iterator[tuple[torch.dtype, Setting]]:
    """What is measured. The most experts first: later cases then fit into memory already had."""
    many = machine.cores()
    for dtype in (torch.float32, torch.bfloat16):
        if quick:
            yield dtype, (3, None if dtype == torch.float32 else 2, False, many)
            yield dtype, (2, None, True, 1)
            continue
        yield from ((dtype, (N, None, False, many)) for N in (16, 8, 5, 3, 2))
        yield dtype, (5, None, True, many)
        if device == "cpu" and many > 1:
            yield dtype, (5, None, False, 1)
    if not quick:  # last: several outputs take the most memory beside the experts
        yield torch.float32, (5, 4, False, many)


# -- other people's ways: weights as (S or 1, N) floats, one result per row of weights ------------


def python_loop(weights: list[list[float]], states: list[dict[str, Tensor]]) -> list[Tensor]:
    rows = weights * len(states[0]) if len(weights) == 1 else weights
    return [
        sum(w * state[key] for w, state in zip(row, states, strict=True))
        for key, row in zip(states[0], rows, strict=True)
    ]


def stack_einsum(weights: Tensor, states: list[dict[str, Tensor]]) -> list[Tensor]:
    rows = weights.expand(len(states[0]), -1)
    return [
        torch.einsum("n,n...->...", row, torch.stack([state[key] for state in states]))
        for key, row in zip(states[0], rows, strict=True)
    ]


def foreach(weights: list[list[float]], tensors: list[list[Tensor]]) -> list[Tensor]:
    if len(weights) == 1:
        total = torch._foreach_mul(tensors[0], weights[0][0])
        for w, more in zip(weights[0][1:], tensors[1:], strict=True):
            torch._foreach_add_(total, more, alpha=w)
        return total
    columns = list(zip(*weights, strict=True))
    total = torch._foreach_mul(tensors[0], columns[0])
    for column, more in zip(columns[1:], tensors[1:], strict=True):
        torch._foreach_add_(total, torch._foreach_mul(more, column))
    return total


def published(weights: list[list[float]], states: list[dict[str, Tensor]]) -> list[Tensor]:
    """Copy every state dict, flatten by sorted key, stack, add up, split into a copy of one."""
    flat = torch.vstack([_flatten({k: t.clone() for k, t in s.items()}) for s in states])
    merged = torch.zeros_like(flat[0])
    for w, row in zip(weights[0], flat, strict=True):
        merged = merged + w * row
    target = {key: tensor.clone() for key, tensor in states[0].items()}
    start = 0
    for key in sorted(target):
        size = target[key].numel()
        target[key] = merged[start : start + size].view_as(target[key]).clone()
        start += size
    return list(target.values())


def _flatten(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([state[key].reshape(-1) for key in sorted(state)])


# -- the case -------------------------------------------------------------------------------------


def draw_weights(N: int, K: int | None, S: int | None, device: str) -> Tensor:
    """Positive weights that sum to one: (N,), (K, N), (S, N) or (K, S, N), fp32."""
    sizes = [size for size in (K, S) if size is not None]
    generator = torch.Generator().manual_seed(1)
    return torch.rand(*sizes, N, generator=generator).add(0.1).softmax(-1).to(device)


def check(weights: Tensor, experts: Experts, per_tensor: bool) -> Callable[[Any], None]:
    """Compares a flat result, or a list of tensors (for every k), with the fp64 reference on the
    first columns of every tensor."""
    windows = [(s.start, min(s.length, _CHECKED)) for s in experts.segments]

    @functools.cache
    def expected(dtype: torch.dtype) -> Tensor:
        pieces = []
        for s, (start, length) in enumerate(windows):
            w = weights[..., s, :] if per_tensor else weights
            theta = experts.params[:, start : start + length].to(dtype)
            pieces.append(blend_reference(w.double(), theta))
        return torch.cat(pieces, -1)

    def piece(result: Any, s: int, start: int, length: int) -> Tensor:
        if isinstance(result, Tensor):
            return result[..., start : start + length]
        if isinstance(result[0], list | tuple):
            return torch.stack([piece(one, s, start, length) for one in result])
        return result[s].reshape(-1)[:length]

    def compare(result: Any) -> None:
        got = torch.cat([piece(result, s, *window) for s, window in enumerate(windows)], -1)
        testing.assert_within_rule(got, expected(experts.params.dtype), expected(torch.float64))

    return compare


def providers(weights: Tensor, experts: Experts, K: int | None, per_tensor: bool) -> list[Provider]:
    params, states = experts.params, experts.state_dicts
    device, out = params.device.type, (K or 1) * params[0].nbytes
    segments = experts.segments.bounds_on(params.device) if per_tensor else None
    tensors = [list(state.values()) for state in states]
    cast = weights.to(params.dtype)
    # (K or 1, S or 1, N), as the loops over tensors want them
    grid = weights.reshape(K or 1, -1, params.shape[0]).tolist()

    def each(function: Callable[..., list[Tensor]], rows: Any, inputs: Any) -> Callable[[], Any]:
        if K is None:
            return lambda: function(rows[0], inputs)
        return lambda: [function(row, inputs) for row in rows]

    args = (weights, params, segments)
    sums = 3 * (K or 1) * params.shape[1] * 4  # of the reference, whole rows in fp32
    found = harness.ours(OP, device, lambda: neulig_fast.blend(*args), args, sums)
    cast_grid = cast.reshape(K or 1, -1, params.shape[0])
    found += [
        Provider("python loop", each(python_loop, grid, states), needs=out),
        Provider("stack + einsum", each(stack_einsum, cast_grid, states), needs=out),
        Provider("torch._foreach", each(foreach, grid, tensors), needs=out),
    ]
    if per_tensor:
        return found
    flat = harness.compiled(blend_reference)
    found += [
        Provider("flat matmul", lambda: cast @ params, needs=out),
        Provider("torch.compile", lambda: flat(weights, params), needs=out),
    ]
    if K is None:
        needs = 2 * params.nbytes + 4 * params[0].nbytes
        found.append(
            Provider("published: flatten and loop", lambda: published(grid[0], states), needs=needs)
        )
    return found


def make_case(size: dict, dtype: torch.dtype, setting: Setting, device: str) -> Case | None:
    N, K, per_tensor, threads = setting
    segments = layout(size, dtype)
    resident = (N + (K or 1) + 2) * segments.width * max(dtype.itemsize, 2)
    if resident > machine.memory(device):
        harness.say(f"blend N={N} K={K} {dtype} skipped: it needs {resident / 1e9:.0f} GB")
        return None
    experts = make_experts(N, segments, dtype, device)
    weights = draw_weights(N, K, len(segments) if per_tensor else None, device)
    case = Case(
        op="blend",
        mode="fwd",
        shape="ViT-B-32" if size is VIT_B_32 else "toy",
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[
            *providers(weights, experts, K, per_tensor),
            *ceilings(experts.params, threads, write=True),
        ],
        check=check(weights, experts, per_tensor),
        traffic=(N + (K or 1)) * experts.params[0].nbytes,
        resident=resident,
        numbers={"N": N, "K": K or 1, "P": segments.width, "S": len(segments) if per_tensor else 1},
    )
    return case


def cases(device: str, quick: bool) -> Iterator[Case]:
    for dtype, setting in settings(quick, device):
        case = make_case(TOY if quick else VIT_B_32, dtype, setting, device)
        if case is not None:
            yield case
            del case


if __name__ == "__main__":
    harness.main("blend", cases)

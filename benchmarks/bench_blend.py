"""blend, forward: experts of ViT-B/32's size into one merged model, or K of them.

Least traffic: N experts read once, K outputs written once. The others: a Python loop over the
tensors, stack + einsum per tensor, a matrix product on the flat arena, ``torch._foreach_*``,
torch.compile of our reference, FusionBench, and the way of the published evaluation, once per test
batch: copy and flatten every expert, stack, add up, split.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.blend import OP, blend_reference
from neulig_fast.segments import Segments

from . import fusionbench, harness, machine, selection
from .ceilings import ceilings
from .harness import Case, Provider
from .shapes import QWEN_1_5B, TOY, VIT_B_32, VIT_L_14, Experts, Shape, layout, make_experts

_CHECKED = 1 << 16  # values of every tensor that are compared with the oracle


@dataclasses.dataclass(frozen=True)
class Setting:
    """One case: experts of a shape, K outputs (None: one, without that dimension)."""

    shape: Shape
    dtype: torch.dtype
    N: int
    K: int | None = None
    per_tensor: bool = False
    threads: int = dataclasses.field(default_factory=lambda: machine.cores())

    @functools.cached_property
    def segments(self) -> Segments:
        return layout(self.shape, self.dtype)

    @property
    def numbers(self) -> dict[str, int]:
        segments = self.segments
        S = len(segments) if self.per_tensor else 1
        return {"N": self.N, "K": self.K or 1, "P": segments.width, "S": S}

    def resident(self, rows: int) -> int:
        """Bytes of ``rows`` arena rows."""
        return rows * self.segments.width * self.dtype.itemsize

    def wanted(self, op: str, device: str, rows: int) -> bool:
        """Whether it is asked for and its inputs, ``rows`` rows, fit into memory."""
        numbers = self.numbers
        if not selection.wanted(self.shape.name, self.dtype, self.threads, **numbers):
            return False
        short = self.resident(rows) - machine.memory(device)
        if short > 0:
            named = " ".join(f"{k}={numbers[k]}" for k in ("N", "K"))
            what = f"{op} {self.shape.name} {named} {self.dtype}".replace("torch.", "")
            harness.say(f"{what} skipped: {short / 1e9:.1f} GB of memory short")
        return short <= 0


def grid(dtype: torch.dtype, device: str, make: Callable[..., Any] = Setting) -> Iterator[Any]:
    """What every op on experts is measured on. The most experts first: later cases then fit into
    memory already had."""
    yield from (make(VIT_B_32, dtype, N) for N in (16, 8, 5, 3, 2))
    yield make(VIT_B_32, dtype, 5, per_tensor=True)
    if device == "cpu" and machine.cores() > 1:
        yield make(VIT_B_32, dtype, 5, threads=1)
    yield make(TOY, dtype, 5)  # what a call costs that moves almost nothing
    yield from (make(shape, dtype, N) for shape in (VIT_L_14, QWEN_1_5B) for N in (5, 2))


def settings(quick: bool, device: str) -> Iterator[Setting]:
    """What is measured."""
    for dtype in (torch.float32, torch.bfloat16):
        if quick:
            yield Setting(TOY, dtype, 3, None if dtype == torch.float32 else 2)
            yield Setting(TOY, dtype, 2, per_tensor=True, threads=1)
        else:
            yield from grid(dtype, device)
    if not quick:  # last: several outputs take the most memory beside the experts
        yield from (Setting(VIT_B_32, dtype, 5, 8) for dtype in (torch.bfloat16, torch.float32))


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
    outputs = weights[..., 0, 0].numel() if per_tensor else weights[..., 0].numel()
    windows = [(s.start, min(s.length, _CHECKED // outputs)) for s in experts.segments]

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
    device, row = params.device.type, params[0].nbytes
    out, largest = (K or 1) * row, max(s.length for s in experts.segments) * params.itemsize
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
    found = harness.ours(OP, device, lambda: neulig_fast.blend(*args), args, sums, out)
    cast_grid = cast.reshape(K or 1, -1, params.shape[0])
    stacked = out + 2 * len(params) * largest
    found += [
        Provider("python loop", each(python_loop, grid, states), needs=out + 2 * largest),
        Provider("stack + einsum", each(stack_einsum, cast_grid, states), needs=stacked),
        Provider("torch._foreach", each(foreach, grid, tensors), needs=out + row * per_tensor),
    ]
    if K is None:
        found += fusionbench.blend_providers(grid[0], experts)
    if per_tensor:
        return found
    flat = harness.compiled(blend_reference)
    found += [
        # A product in bf16 may first copy the arena into an order it prefers.
        Provider("flat matmul", lambda: cast @ params, needs=out + params.nbytes),
        Provider("torch.compile", lambda: flat(weights, params), needs=out),
    ]
    if K is None:
        needs = 2 * params.nbytes + 4 * row
        found.append(
            Provider("published: flatten and loop", lambda: published(grid[0], states), needs=needs)
        )
    return found


def make_case(setting: Setting, device: str) -> Case:
    N, K, per_tensor = setting.N, setting.K, setting.per_tensor
    segments = setting.segments
    experts = make_experts(N, segments, setting.dtype, device)
    weights = draw_weights(N, K, len(segments) if per_tensor else None, device)
    found = providers(weights, experts, K, per_tensor)
    return Case(
        op="blend",
        mode="fwd",
        shape=setting.shape.name,
        dtype=setting.dtype,
        device=device,
        threads=setting.threads,
        providers=[*found, *ceilings(experts.params, setting.threads, write=True)],
        check=check(weights, experts, per_tensor),
        traffic=setting.resident(N + (K or 1)),
        flops=2 * N * (K or 1) * segments.width,
        resident=setting.resident(N + 1) + sum(p.holds for p in found),
        numbers=setting.numbers,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for setting in settings(quick, device):
        if setting.wanted("blend", device, setting.N + (setting.K or 1) + 1):
            yield make_case(setting, device)


if __name__ == "__main__":
    harness.main("blend", cases)

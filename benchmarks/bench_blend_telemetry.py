"""blend_telemetry, forward: a blend, and norms, counts and sign conflicts, relative to expert 0.

Least traffic is a blend's: N experts read once, K outputs written once. The others: our blend and
then passes of PyTorch, tensor by tensor where statistics are wanted per tensor (their norms of the
merged task vectors are of the rounded result, all that is left of it); torch.compile of our
reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.blend_telemetry import OP, Results, blend_telemetry_reference

from . import bench_blend, harness
from .bench_blend import Setting, draw_weights, grid
from .ceilings import ceilings
from .harness import Case, Provider
from .shapes import TOY, VIT_B_32, Experts, make_experts

_BLOCK = 1 << 20  # columns of the oracle at a time
_BASE = 0
_EPS = torch.finfo(torch.float32).eps  # of the offsets; their squares are added in fp64


def settings(quick: bool, device: str) -> Iterator[Setting]:
    if quick:
        yield Setting(TOY, torch.float32, 3)
        yield Setting(TOY, torch.bfloat16, 2)
        yield Setting(TOY, torch.float32, 2, 2, per_tensor=True, threads=1)
        return
    for dtype in (torch.float32, torch.bfloat16):
        yield from grid(dtype, device)
    yield Setting(VIT_B_32, torch.float32, 5, 4)


def telemetry(weights: Tensor, params: Tensor, segments: Tensor | None) -> Results:
    """The op's five results, as every provider returns them."""
    return OP(weights, params, segments, None, _BASE)


# -- another way ----------------------------------------------------------------------------------


def blend_then_measure(
    weights: Tensor, params: Tensor, segments: Tensor | None, bounds: list[int]
) -> Results:
    theta = neulig_fast.blend(weights, params, segments)
    ranges = list(pairwise(bounds))
    parts = [_measure(theta[..., a:b], params[:, a:b]) for a, b in ranges]
    counts, squares, merged, conflicts = zip(*parts, strict=True)
    if segments is None:
        return theta, counts[0], squares[0], merged[0], conflicts[0]
    return (
        theta,
        torch.stack(counts, -1),
        torch.stack(squares),
        torch.stack(merged, -1),
        torch.stack(conflicts),
    )


def _measure(theta: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    base = params[_BASE].float()
    above = below = torch.zeros_like(base, dtype=torch.bool)
    squares = []
    for row in params:
        offset = row.float() - base
        squares.append(torch.linalg.vector_norm(offset, dtype=torch.float64).square())
        above, below = above | (offset > 0), below | (offset < 0)
    merged = torch.linalg.vector_norm(theta.float() - base, dim=-1, dtype=torch.float64).square()
    nonfinite = (~theta.isfinite()).sum(-1)
    counts = torch.stack([nonfinite, torch.zeros_like(nonfinite)])
    return counts, torch.stack(squares), merged, (above & below).sum()


# -- the case -------------------------------------------------------------------------------------


def check(weights: Tensor, experts: Experts, per_tensor: bool) -> Callable[[Results], None]:
    """Compares theta as bench_blend does, and sums and counts with the fp64 reference's."""
    bounds, width = experts.segments.bounds.tolist(), experts.params.shape[1]
    ranges = list(pairwise(bounds if per_tensor else [*range(0, width, _BLOCK), width]))
    theta_fits = bench_blend.check(weights, experts, per_tensor)

    @functools.cache
    def expected(dtype: torch.dtype) -> list[Tensor]:
        parts = []
        for s, (a, b) in enumerate(ranges):
            w = weights[..., s, :] if per_tensor else weights
            theta = experts.params[:, a:b].to(dtype)
            parts.append(blend_telemetry_reference(w.double(), theta, None, None, _BASE)[1:])
        counts, squares, merged, conflicts = zip(*parts, strict=True)
        found = [torch.stack(squares), torch.stack(merged, -1)]
        found += [torch.stack(counts, -1), torch.stack(conflicts)]
        return found if per_tensor else [f.sum(0 if f is found[0] else -1) for f in found]

    def compare(result: Results) -> None:
        theta, counts, squares, merged, conflicts = result
        theta_fits(theta)
        working, oracle = expected(experts.params.dtype), expected(torch.float64)
        testing.assert_within_rule(squares, working[0], oracle[0], width, _EPS)
        testing.assert_within_rule(merged, working[1], oracle[1], width, _EPS)
        if not torch.equal(counts, working[2]) or not torch.equal(conflicts, working[3]):
            raise AssertionError("counts differ from the reference's")

    return compare


def providers(weights: Tensor, experts: Experts, per_tensor: bool) -> list[Provider]:
    params = experts.params
    device, out = params.device.type, weights[..., 0].numel() * params[0].nbytes
    bounds, segments = [0, params.shape[1]], None
    if per_tensor:
        out = out // len(experts.segments)
        bounds = experts.segments.bounds.tolist()
        segments = experts.segments.bounds_on(params.device)
    args, row = (weights, params, segments), 4 * params.shape[1]
    offsets = 3 * (len(params) + 2) * row  # of the reference, whole rows in fp32 and fp64
    found = harness.ours(OP, device, lambda: telemetry(*args), (*args, None, _BASE), offsets, out)
    separate = Provider(
        "blend, then torch", lambda: blend_then_measure(*args, bounds), needs=out + 6 * row
    )
    if per_tensor:
        return [*found, separate]
    flat = harness.compiled(lambda w, p: blend_telemetry_reference(w, p, None, None, _BASE))
    compiled = Provider("torch.compile", lambda: flat(weights, params), needs=out + row)
    return [*found, separate, compiled]


def make_case(setting: Setting, device: str) -> Case:
    N, outputs, segments = setting.N, setting.K or 1, setting.segments
    experts = make_experts(N, segments, setting.dtype, device)
    per_tensor = setting.per_tensor
    weights = draw_weights(N, setting.K, len(segments) if per_tensor else None, device)
    return Case(
        op="blend_telemetry",
        mode="fwd",
        shape=setting.shape.name,
        dtype=setting.dtype,
        device=device,
        threads=setting.threads,
        providers=[
            *providers(weights, experts, per_tensor),
            *ceilings(experts.params, setting.threads, write=True),
        ],
        check=check(weights, experts, per_tensor),
        traffic=setting.resident(N + outputs),
        flops=(2 * N * outputs + 7 * N) * segments.width,
        resident=setting.resident(N + 1),
        numbers=setting.numbers,
    )


def cases(device: str, quick: bool) -> Iterator[Case]:
    for setting in settings(quick, device):
        if setting.wanted("blend_telemetry", device, setting.N + (setting.K or 1) + 1):
            yield make_case(setting, device)


if __name__ == "__main__":
    harness.main("blend_telemetry", cases)

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

import bench_blend
import harness
import machine
import torch
from ceilings import ceilings
from harness import Case, Provider
from shapes import TOY, VIT_B_32, Experts, layout, make_experts
from torch import Tensor

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.blend_telemetry import OP, Results, blend_telemetry_reference

_BLOCK = 1 << 20  # columns of the oracle at a time
_BASE = 0

Setting = tuple[int, int | None, bool, int]  # N, K, per tensor?, threads


def settings(quick: bool, device: str) -> Iterator[tuple[torch.dtype, Setting]]:
    many = machine.cores()
    if quick:
        yield torch.float32, (3, None, False, many)
        yield torch.bfloat16, (2, None, False, many)
        yield torch.float32, (2, 2, True, 1)
        return
    for dtype in (torch.float32, torch.bfloat16):
        yield from ((dtype, (N, None, False, many)) for N in (16, 8, 5, 3, 2))
        yield dtype, (5, None, True, many)
        if device == "cpu" and many > 1:
            yield dtype, (5, None, False, 1)
    yield torch.float32, (5, 4, False, many)


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
        testing.assert_within_rule(squares, working[0], oracle[0], width)
        testing.assert_within_rule(merged, working[1], oracle[1], width)
        if not torch.equal(counts, working[2]) or not torch.equal(conflicts, working[3]):
            raise AssertionError("counts differ from the reference's")

    return compare


def providers(weights: Tensor, experts: Experts, per_tensor: bool) -> list[Provider]:
    params = experts.params
    device, row = params.device.type, 4 * params.shape[1]
    segments = experts.segments.bounds_on(params.device) if per_tensor else None
    bounds = experts.segments.bounds.tolist() if per_tensor else [0, params.shape[1]]
    args = (weights, params, segments)
    offsets = 3 * (len(params) + 2) * row  # of the reference, whole rows in fp32 and fp64
    found = harness.ours(
        OP, device, lambda: telemetry(*args), (*args, None, _BASE), reference_needs=offsets
    )
    separate = Provider(
        "blend, then torch", lambda: blend_then_measure(*args, bounds), needs=6 * row
    )
    if per_tensor:
        return [*found, separate]
    flat = harness.compiled(lambda w, p: blend_telemetry_reference(w, p, None, None, _BASE))
    compiled = Provider("torch.compile", lambda: flat(weights, params), needs=row)
    return [*found, separate, compiled]


def make_case(size: dict, dtype: torch.dtype, setting: Setting, device: str) -> Case | None:
    N, K, per_tensor, threads = setting
    segments = layout(size, dtype)
    resident = (N + (K or 1) + 2) * segments.width * dtype.itemsize
    if resident > machine.memory(device):
        harness.say(f"blend_telemetry N={N} {dtype} skipped: it needs {resident / 1e9:.0f} GB")
        return None
    experts = make_experts(N, segments, dtype, device)
    weights = bench_blend.draw_weights(N, K, len(segments) if per_tensor else None, device)
    return Case(
        op="blend_telemetry",
        mode="fwd",
        shape="ViT-B-32" if size is VIT_B_32 else "toy",
        dtype=dtype,
        device=device,
        threads=threads,
        providers=[
            *providers(weights, experts, per_tensor),
            *ceilings(experts.params, threads, write=True),
        ],
        check=check(weights, experts, per_tensor),
        traffic=(N + (K or 1)) * experts.params[0].nbytes,
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
    harness.main("blend_telemetry", cases)

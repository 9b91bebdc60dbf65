"""magnitude_sums beyond test_house.py: by hand, an oracle in fp64 that merge_task_vectors tells
what is kept, cuts and tiles anywhere, what is not finite, bits, errors."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS

ROOT = Path(__file__).resolve().parents[1]
OP = OPS["magnitude_sums"]
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
needs_cpu = pytest.mark.skipif(("cpu", "cpu") not in BACKENDS, reason="no native cpu backend")
NAN, INF = float("nan"), float("inf")


def run(backend, *args, **options):
    with neulig_fast.use_backend(magnitude_sums=backend):
        return neulig_fast.magnitude_sums(*args, **options)


def coarse(*shape, device="cpu", dtype=torch.float32, seed=0):
    """Multiples of 1/4: many are equal, and their sums exact in every type."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return ((drawn * 4).round() / 4).to(device, dtype)


def rules(device, dtype):
    """Bounds with cuts, draws, and both."""
    wide = torch.promote_types(dtype, torch.float32)

    def numbers(*values, dtype=wide):
        return torch.tensor(values, device=device, dtype=dtype)

    places = torch.int64
    low = {"lower": numbers(0.5, 0.25), "lower_cut": numbers(37, 201, dtype=places)}
    high = {"upper": numbers(1.0, 1.5), "upper_cut": numbers(150, 9, dtype=places)}
    draws = {"density": numbers(0.5, 0.3), "seed": 7, "streams": numbers(3, -2, dtype=places)}
    return {}, low, high, draws, {**low, **high, **draws}


def oracle(params, base, **rule):
    """(2, N) in fp64; what is kept, merge_task_vectors says of ones."""
    d = params.double() if base is None else params.double() - base.double()
    one = torch.ones(1, device=params.device)
    found = []
    for i, row in enumerate(d):
        own = {k: v[i : i + 1] if isinstance(v, torch.Tensor) else v for k, v in rule.items()}
        with neulig_fast.use_backend(merge_task_vectors="torch"):
            kept = neulig_fast.merge_task_vectors(row[None], one, **widened(own))
        sizes = (row.abs().cpu().numpy(), kept.abs().cpu().numpy())
        found.append([float(np.sum(size)) for size in sizes])
    return torch.tensor(found, dtype=torch.float64).T


def widened(rule):
    return {k: v.double() if k in ("lower", "upper") else v for k, v in rule.items()}


@on_every_backend
def test_by_hand(device, backend):
    params = torch.tensor([[1.0, -2, 3, -4], [1, 1, 1, 1]], device=device)
    assert run(backend, params).tolist() == [[[10, 4], [10, 4]]]
    lower = torch.tensor([2.0, 1.0], device=device)
    cut = torch.tensor([1, 3], device=device)
    got = run(backend, params, lower=lower, lower_cut=cut)
    assert got.tolist() == [[[10, 4], [7, 3]]]
    got = run(backend, params, params[1], [0, 2, 4], upper=lower)
    assert got.tolist() == [[[3, 0], [0, 0]], [[7, 0], [2, 0]]]


@in_every_dtype
@on_every_backend
def test_every_rule_as_the_oracle_has_it(device, backend, dtype):
    P = 133 if (backend, device) == ("triton", "cpu") else 9001
    arena = coarse(5, P + 5, device=device, dtype=dtype)
    params, base = arena[1::2, 3 : P + 3], coarse(P, device=device, dtype=dtype, seed=1)
    for row in (None, base):
        for rule in rules(device, dtype):
            start = 2**33 + 5 if "density" in rule and "lower" not in rule else 0
            got = run(backend, params, row, start=start, **rule)[0]
            assert torch.equal(got.cpu(), oracle(params, row, start=start, **rule))


@needs_cpu
@in_every_dtype
def test_sums_do_not_depend_on_where_cuts_and_blocks_lie(dtype):
    """A cut that splits no tie changes nothing but where columns are taken apart."""
    params = torch.randn(2, 10_003, generator=torch.Generator().manual_seed(3)).to(dtype)
    rule = rules("cpu", dtype)[3]
    expected = run("cpu", params, **rule)
    lower = torch.full((2,), -1.0)
    for cuts in ((1, 15), (16, 4095), (4097, 8200), (10_002, 5)):
        cut = torch.tensor(cuts)
        assert torch.equal(run("cpu", params, lower=lower, lower_cut=cut, **rule), expected)


@on_every_backend
def test_segments_and_tiles_are_places_of_one_tensor(device, backend):
    params, bounds = coarse(2, 500, device=device), [0, 100, 117, 117, 500]
    rule = rules(device, torch.float32)[4]
    got = run(backend, params, None, bounds, start=40, **rule)
    for k, (a, b) in enumerate(itertools.pairwise(bounds)):
        part = run(backend, params[:, a:b], start=40 + a, **rule)
        assert torch.equal(got[k], part[0])
    assert torch.equal(got.sum(0), run(backend, params, start=40, **rule)[0])


@on_every_backend
def test_what_is_not_finite_is_counted_where_it_is_kept(device, backend):
    params = torch.ones(2, 60, device=device)
    params[0, 50], params[1, 30] = NAN, -INF
    bound = torch.tensor([5.0, 5.0], device=device)
    got = run(backend, params, None, [0, 40, 60], upper=bound)
    assert got[0].tolist() == [[40, INF], [40, 39]]
    assert got[1, :, 0].isnan().all() and got[1, :, 1].tolist() == [20, 20]
    nothing = run(backend, params, density=torch.zeros(2, device=device))
    assert nothing[0, 1].tolist() == [0, 0]


@on_every_backend
def test_nothing_to_sum(device, backend):
    assert run(backend, torch.empty(2, 0, device=device)).tolist() == [[[0, 0], [0, 0]]]
    assert run(backend, torch.empty(2, 0, device=device), None, [0]).shape == (0, 2, 2)


def some_bits():
    """Of every type and kernel, of values whose sums are rounded."""
    found = []
    for dtype in testing.DTYPES:
        params = torch.randn(3, 9999, generator=torch.Generator().manual_seed(4)).to(dtype)
        for rule in rules("cpu", dtype):
            found.append(run("cpu", params[:2, 1:], params[2, 1:], start=77, **rule))
    return [part.flatten().tolist() for part in found]


@needs_cpu
def test_bits_do_not_depend_on_threads():
    params = torch.randn(3, 400_001, generator=torch.Generator().manual_seed(5)).bfloat16()
    threads, seen, rule = torch.get_num_threads(), [], rules("cpu", torch.bfloat16)[4]
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            seen.append(run("cpu", params[:2], params[2], **rule))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 3])
def test_lower_instruction_sets_have_the_same_bits(level):
    from neulig_fast import _C

    if level >= _C.cpu_level():
        pytest.skip(f"level {_C.cpu_level()} is what the other tests run at")
    code = "import sys; sys.path.insert(0, 'tests'); import test_magnitude_sums as t; "
    environment = {**os.environ, "NEULIG_FAST_CPU": str(level)}
    done = subprocess.run(
        [sys.executable, "-c", code + "print(t.some_bits())"],
        env=environment, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(some_bits()), done.stderr


# -- errors ---------------------------------------------------------------------------------------

X, W = torch.ones(2, 3), torch.ones(2)


@pytest.mark.parametrize(
    "args, rule, message",
    [
        ((torch.ones(3),), {}, r"params must be \(N, P\) with N >= 1, got \(3,\)"),
        ((X, torch.ones(2)), {}, r"base must be \(P,\) = \(3,\), got \(2,\)"),
        ((X, None, [0, 2]), {}, "segments must ascend from 0 to P = 3"),
        ((X, None, torch.tensor([0, 3]).int()), {}, "segments must be int64"),
        ((X,), {"density": torch.tensor([0.5, 1.5])}, r"density must be in \[0, 1\]"),
        ((X,), {"lower_cut": W.long()}, "lower_cut is given without lower"),
        ((X,), {"upper": W.double()}, "upper must be torch.float32 or a float type it holds"),
        ((X,), {"start": -1}, "start must not be negative, got -1"),
    ],
)
def test_wrong_arguments_are_named(args, rule, message):
    with pytest.raises(ValueError, match=f"magnitude_sums: (.|\n)*{message}"):
        neulig_fast.magnitude_sums(*args, **rule)


def test_arguments_of_another_type_are_named():
    with pytest.raises(TypeError, match="density must be a tensor, got float"):
        neulig_fast.magnitude_sums(X, density=0.5)
    with pytest.raises(TypeError, match="params must be a tensor, got list"):
        neulig_fast.magnitude_sums([1.0])


@needs_cpu
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"params": torch.ones(3)}, r"params must be \(N, P\)"),
        ({"sums": torch.ones(1, 2, 2)}, "sums must be contiguous Double"),
        ({"base": torch.ones(3).half()}, "base must be contiguous Float"),
        ({"numbers": torch.ones(4, 2)}, "numbers must be contiguous Float"),
        ({"rule": 4}, "rule 4 needs places"),
        ({"rule": 16}, "rule must be 0 to 15, got 16"),
        ({"start": -1}, "start must be 0 to"),
        ({"segments": torch.tensor([0, 2])}, "segments must ascend from 0 to P = 3"),
    ],
)
def test_the_native_twin_has_its_own_door(changes, message):
    call = {"sums": torch.ones(1, 2, 2).double(), "params": X, "base": None, "segments": None}
    call |= {"numbers": torch.ones(5, 2), "places": None, "rule": 0, "seed": 0, "start": 0}
    with pytest.raises(RuntimeError, match=f"magnitude_sums: {message}"):
        torch.ops.neulig_fast_C.magnitude_sums(**(call | changes))

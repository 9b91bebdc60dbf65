"""gram beyond test_house.py: by hand, an oracle in fp64, blocks and segments, what is not finite,
bits, errors."""

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
OP = OPS["gram"]
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
needs_cpu = pytest.mark.skipif(("cpu", "cpu") not in BACKENDS, reason="no native cpu backend")
NAN, INF = float("nan"), float("inf")


def run(backend, *args):
    with neulig_fast.use_backend(gram=backend):
        return neulig_fast.gram(*args)


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(device, dtype)


def oracle(params, base=None):
    """In fp64, where products of fp32 differences are exact, by NumPy."""
    wide = torch.promote_types(params.dtype, torch.float32)
    d = params.to(wide) if base is None else params.to(wide) - base.to(wide)
    d = d.double().cpu().numpy()
    return torch.from_numpy(np.einsum("ip,jp->ij", d, d))


@on_every_backend
def test_by_hand(device, backend):
    params = torch.tensor([[1.0, 2, 3], [4, 5, 6]], device=device)
    assert run(backend, params).tolist() == [[[14, 32], [32, 77]]]
    base = torch.tensor([1.0, 1, 1], device=device)
    assert run(backend, params, base).tolist() == [[[5, 14], [14, 50]]]
    got = run(backend, params, None, [0, 0, 1, 3])
    assert got.tolist() == [[[0, 0], [0, 0]], [[1, 4], [4, 16]], [[13, 28], [28, 61]]]


@in_every_dtype
@on_every_backend
@pytest.mark.parametrize("experts", [1, 2, 3, 4, 5, 6, 9, 13])
def test_as_the_oracle_has_it(device, backend, dtype, experts):
    if (backend, device) == ("triton", "cpu") and experts not in (1, 5):
        pytest.skip("interpreted Triton takes long: one row, and two groups of rows, are enough")
    P = 300 if (backend, device) == ("triton", "cpu") else 9001
    arena = normal(2 * experts, P + 5, device=device, dtype=dtype)
    params, base = arena[::2, 3 : P + 3], normal(P, dtype=dtype, seed=1).to(device)
    for row in (None, base):
        got = run(backend, params, row)[0].cpu()
        assert torch.equal(got, got.mT)
        # A sum of rounded products is at most so far from the exact one.
        scale = oracle(params, row).diagonal().sqrt()
        room = 2 * P**0.5 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
        assert ((got - oracle(params, row)).abs() <= room * scale[:, None] * scale).all()


@needs_cpu
def test_a_long_sum_of_equal_numbers_keeps_its_digits():
    params = torch.full((2, 1 << 20), 1 + 2.0**-7, dtype=torch.bfloat16)
    expected = (1 << 20) * (1 + 2.0**-7) ** 2
    assert run("cpu", params)[0].tolist() == [[expected] * 2] * 2
    params = torch.full((2, (1 << 22) + 1), 1 + 2.0**-23)
    expected = params.shape[1] * (1 + 2.0**-23) ** 2
    assert (run("cpu", params)[0] / expected - 1).abs().max() < 2.0**-22


@in_every_dtype
@on_every_backend
def test_equal_rows_and_the_base_itself_give_zeros(device, backend, dtype):
    row = normal(70, device=device, dtype=dtype)
    assert not run(backend, torch.stack([row] * 3), row).any()


@on_every_backend
def test_segments_are_tensors_of_their_own(device, backend):
    params, base = normal(3, 500, device=device), normal(500, device=device, seed=1)
    got = run(backend, params, base, [0, 100, 117, 117, 500])
    for k, (a, b) in enumerate(((0, 100), (100, 117), (117, 117), (117, 500))):
        part = run(backend, params[:, a:b], base[a:b])[0]
        assert torch.allclose(got[k], part, rtol=1e-6, atol=1e-6)
        if (backend, device) == ("cpu", "cpu"):
            assert torch.equal(got[k], part)


@on_every_backend
def test_what_is_not_finite_stays_in_its_rows_and_its_segment(device, backend):
    params = torch.ones(3, 40, device=device)
    params[0, 5], params[1, 25] = NAN, INF
    got = run(backend, params, None, [0, 20, 40])
    assert got[0, 0].isnan().all() and got[0, 1:, 1:].eq(20).all()
    assert got[1, 1].isinf().all() and got[1, 0, 0] == 20 and got[1, 0, 2] == 20
    assert run(backend, params, params[1])[0, 1].isnan().all()  # infinity less itself


@on_every_backend
def test_nothing_to_multiply(device, backend):
    assert run(backend, torch.empty(2, 0, device=device)).tolist() == [[[0, 0], [0, 0]]]
    assert run(backend, torch.empty(2, 0, device=device), None, [0]).shape == (0, 2, 2)


@needs_cpu
def test_bits_do_not_depend_on_threads():
    params, threads, seen = normal(7, 400_001, dtype=torch.bfloat16), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            seen.append((run("cpu", params), run("cpu", params[:3], params[3])))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def some_bits():
    """Of every type, number of rows and kernel."""
    found = []
    for dtype in testing.DTYPES:
        params = normal(9, 4999, dtype=dtype)
        for n in (1, 2, 3, 4, 7):
            found += [run("cpu", params[:n, 1:]), run("cpu", params[:n], params[8])]
    return [part.flatten().tolist() for part in found]


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 3])
def test_lower_instruction_sets_have_the_same_bits(level):
    from neulig_fast import _C

    if level >= _C.cpu_level():
        pytest.skip(f"level {_C.cpu_level()} is what the other tests run at")
    code = "import sys; sys.path.insert(0, 'tests'); import test_gram; print(test_gram.some_bits())"
    environment = {**os.environ, "NEULIG_FAST_CPU": str(level)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(some_bits()), done.stderr


# -- errors ---------------------------------------------------------------------------------------

X = torch.ones(2, 3)


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3),), r"params must be \(N, P\) with N >= 1, got \(3,\)"),
        ((X.int(),), "params must be fp32, bf16, fp16 or fp64"),
        ((X, torch.ones(2)), r"base must be \(P,\) = \(3,\), got \(2,\)"),
        ((X, torch.ones(3).half()), "base must be torch.float32 like params, got torch.float16"),
        ((X, None, [0, 2]), "segments must ascend from 0 to P = 3"),
        ((X, None, torch.tensor([0, 3]).int()), "segments must be int64"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=f"gram: (.|\n)*{message}"):
        neulig_fast.gram(*args)


def test_arguments_of_another_type_are_named():
    with pytest.raises(TypeError, match="base must be a tensor, got list"):
        neulig_fast.gram(X, [0.0, 0.0, 0.0])


@needs_cpu
@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3), None, None), r"params must be \(N, P\)"),
        ((X, torch.ones(3).half(), None), r"base must be contiguous Float \(3\)"),
        ((X, None, torch.tensor([0, 2])), "segments must ascend from 0 to P = 3"),
    ],
)
def test_the_native_twin_has_its_own_door(args, message):
    with pytest.raises(RuntimeError, match=f"gram: {message}"):
        torch.ops.neulig_fast_C.gram(*args)

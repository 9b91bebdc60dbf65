"""blend_telemetry beyond test_house.py: theta's bits, counts and norms by brute force, errors."""

import math
from itertools import pairwise

import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS
from neulig_fast.kernels.blend_telemetry import overflow_limit
from neulig_fast.ops.blend_telemetry import blend_telemetry_reference

BACKENDS = testing.backends_of(OPS["blend_telemetry"])
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
INF, NAN = math.inf, math.nan


def run(backend, *args, **options):
    with neulig_fast.use_backend(blend_telemetry=backend):
        return neulig_fast.blend_telemetry(*args, **options)


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def same(a, b):
    """Equal shapes, dtypes and bits, any NaN being the same."""
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(
        a.nan_to_num(0.0), b.nan_to_num(0.0)
    )  # fmt: skip


def truncates(device, backend, dtype):
    return backend == "triton" and device == "cpu" and dtype == torch.bfloat16


# -- theta ---------------------------------------------------------------------------------------


@on_every_backend
@pytest.mark.parametrize("n", [1, 2, 9])
def test_theta_keeps_the_sign_of_zero(device, backend, n):
    params = torch.tensor([[-0.0, 0.0]]).expand(n, 2).contiguous().to(device)
    theta = run(backend, torch.ones(n, device=device), params)[0]
    assert theta.signbit().tolist() == [True, False]


@in_every_dtype
@on_every_backend
@pytest.mark.parametrize("n, k", [(1, 1), (3, 3), (8, 2), (11, 1)])
def test_theta_has_blends_bits(device, backend, dtype, n, k):
    if truncates(device, backend, dtype):
        pytest.skip("Triton's interpreter truncates fp32 to bf16")
    params = normal(n, 150, device=device, dtype=dtype)[:, 7:136]
    params[0, 5] = NAN
    params[-1, 40] = INF
    weights = normal(k, 3, n, device=device, seed=1)
    bounds = [0, 1, 77, 129]
    theta, _ = run(backend, weights, params, bounds)
    with neulig_fast.use_backend(blend="torch"):
        assert same(theta, neulig_fast.blend(weights, params, bounds))


@pytest.mark.parametrize("out_dtype", testing.DTYPES, ids=str)
@in_every_dtype
@on_every_backend
def test_theta_is_the_sum_rounded_to_out_dtype(device, backend, dtype, out_dtype):
    if truncates(device, backend, out_dtype):
        pytest.skip("Triton's interpreter truncates fp32 to bf16")
    params = normal(5, 131, device=device, dtype=dtype)
    weights = 3e4 * normal(5, device=device, seed=1)
    wide = torch.promote_types(dtype, torch.float32)
    with neulig_fast.use_backend(blend="torch"):
        expected = neulig_fast.blend(weights, params.to(wide)).to(out_dtype)
    theta, telemetry = run(backend, weights, params, out_dtype=out_dtype)
    assert same(theta, expected)
    assert int(telemetry.saturated) == int(expected.isinf().sum())
    assert (int(telemetry.saturated) > 0) == (out_dtype == torch.float16)


# -- counts --------------------------------------------------------------------------------------


@on_every_backend
def test_planted_values_are_counted_where_they_are(device, backend):
    params = normal(3, 5000, device=device)
    for row, column, value in ((0, 3, NAN), (1, 3, INF), (2, 4999, -INF), (1, 700, 7e4)):
        params[row, column] = value
    weights = torch.ones(2, 3, 3, device=device)
    weights[1] = 0.5
    _, telemetry = run(backend, weights, params, [0, 600, 4096, 5000], out_dtype=torch.float16)
    assert telemetry.nonfinite.tolist() == [[1, 1, 1], [1, 0, 1]]
    assert telemetry.saturated.tolist() == [[0, 1, 0], [0, 0, 0]]
    norms = telemetry.merged_norms
    assert norms[:, 1].isfinite().all() and norms[:, 0].isnan().all()


@on_every_backend
@pytest.mark.parametrize(
    "out_dtype, most", [(torch.float16, 65504.0), (torch.bfloat16, 3.3895313892515355e38)]
)
def test_the_largest_finite_number_and_what_rounds_to_it(device, backend, out_dtype, most):
    limit = overflow_limit(out_dtype)
    below = torch.tensor(limit).nextafter(torch.tensor(0.0))
    values = [most, -most, float(below), limit, -limit, INF, NAN, 0.0]
    params = torch.tensor([values], device=device)
    theta, telemetry = run(backend, torch.ones(1, device=device), params, out_dtype=out_dtype)
    assert (int(telemetry.nonfinite), int(telemetry.saturated)) == (4, 2)
    if not truncates(device, backend, out_dtype):
        assert theta.isfinite().tolist() == [v in values[:3] or v == 0 for v in values]
        assert int(theta.isfinite().sum()) == 4


@on_every_backend
def test_fp64_sums_that_fp32_cannot_hold(device, backend):
    params = torch.tensor([[1e39, -1e39, 1.0, 65519.9999999]], device=device, dtype=torch.float64)
    one = torch.ones(1, device=device)
    for out_dtype, saturated in ((torch.float32, 2), (torch.float64, 0), (torch.float16, 3)):
        theta, telemetry = run(backend, one, params, out_dtype=out_dtype)
        assert torch.equal(theta, params[0].to(out_dtype))
        assert int(telemetry.saturated) == int(telemetry.nonfinite) == saturated


@in_every_dtype
@on_every_backend
@pytest.mark.parametrize("base", [0, 2, 8])
def test_sign_conflicts_by_brute_force(device, backend, dtype, base):
    params = torch.randint(-1, 2, (9, 300), generator=torch.Generator().manual_seed(4))
    params[3:, 100:200] = params[0, 100:200]  # few differ there
    params = params.to(device, dtype)
    bounds = [0, 0, 33, 100, 101, 300]
    _, telemetry = run(backend, normal(5, 9, device=device), params, bounds, base=base)
    offsets = [[x - column[base] for x in column] for column in params.double().T.tolist()]
    conflict = [min(column) < 0 < max(column) for column in offsets]
    assert telemetry.sign_conflicts.tolist() == [sum(conflict[a:b]) for a, b in pairwise(bounds)]
    assert telemetry.columns.tolist() == [b - a for a, b in pairwise(bounds)]
    rate = telemetry.sign_conflict_rate
    assert rate[0] == 0 and float(rate[1]) == sum(conflict[:33]) / 33


@on_every_backend
def test_relative_to_the_mean_columns_conflict_where_experts_differ(device, backend):
    params = normal(1, 90, device=device).repeat(4, 1)
    params[2, 10:40] += 1e-3
    _, telemetry = run(backend, torch.full((4,), 0.25, device=device), params)
    assert int(telemetry.sign_conflicts) == 30
    assert float(telemetry.sign_conflict_rate) == 30 / 90


# -- norms ---------------------------------------------------------------------------------------


@on_every_backend
def test_norms_of_whole_numbers_are_exact(device, backend):
    params = torch.tensor([[1.0, 2, 3, 4], [4.0, 2, 3, 8], [1.0, 2, 0, 4]], device=device)
    weights = torch.tensor([[0.0, 1, 0], [1.0, 1, -1]], device=device)
    theta, telemetry = run(backend, weights, params, base=0)
    assert telemetry.expert_norms.tolist() == [0, 5, 3]
    assert telemetry.merged_norms.tolist() == [5, math.sqrt(9 + 9 + 16)]
    assert theta[1].tolist() == [4, 2, 6, 8]
    _, telemetry = run(backend, torch.tensor([0.25, 0.25, 0.25, 0.25], device=device),
                       torch.tensor([[8.0], [0.0], [0.0], [0.0]], device=device))  # fmt: skip
    assert telemetry.expert_norms.tolist() == [6, 2, 2, 2] and float(telemetry.merged_norms) == 0


@in_every_dtype
@on_every_backend
@pytest.mark.parametrize("base", [None, 1])
@pytest.mark.parametrize("n", [1, 3, 8, 20])
def test_norms_obey_the_rule_far_from_the_origin(device, backend, dtype, base, n):
    if base is not None and base >= n:
        pytest.skip("no such row")
    params = (100 + normal(n, 4500, device=device)).to(dtype)
    weights = torch.full((2, 2, n), 1 / n, device=device)
    args = (weights, params, torch.tensor([0, 4095, 4500], device=device), torch.float32, base)
    with neulig_fast.use_backend(blend_telemetry=backend):
        got = OPS["blend_telemetry"](*args)
    working = blend_telemetry_reference(*args)
    oracle = blend_telemetry_reference(*testing.cast(args, torch.float64))
    for a, b, c in zip(got[2:4], working[2:4], oracle[2:4], strict=True):
        testing.assert_within_rule(a, b, c, terms=4500)


@on_every_backend
def test_equal_experts_have_task_vectors_of_norm_zero(device, backend):
    params = normal(1, 1000, device=device).repeat(7, 1)
    _, telemetry = run(backend, torch.full((7,), 1 / 7, device=device), params)
    assert telemetry.expert_norms.tolist() == [0.0] * 7 and int(telemetry.sign_conflicts) == 0


@on_every_backend
def test_norms_that_fp32_squares_could_not_hold(device, backend):
    params = torch.tensor([[0.0, 0], [3e30, 4e30], [3e-30, 4e-30]], device=device)
    _, telemetry = run(backend, torch.tensor([0.0, 1, 0], device=device), params, base=0)
    expected = torch.tensor([0, 5e30, 5e-30], dtype=torch.float64)
    torch.testing.assert_close(telemetry.expert_norms.cpu(), expected, rtol=1e-6, atol=0)


# -- bits ----------------------------------------------------------------------------------------


def everything(*args, **options):
    theta, telemetry = neulig_fast.blend_telemetry(*args, **options)
    return [theta, *telemetry]


@in_every_dtype
@pytest.mark.parametrize("n", [5, 9])
def test_cpu_bits_do_not_depend_on_threads(dtype, n):
    if OPS["blend_telemetry"].why_not("cpu", "cpu") is not None:
        pytest.skip("no native extension")
    params, weights = normal(n, 200_003, dtype=dtype), normal(2, 3, n, seed=1)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            with neulig_fast.use_backend("cpu"):
                found.append(everything(weights, params, [0, 70_001, 70_005, 200_003]))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@on_every_backend
def test_k_outputs_are_k_calls_bit_for_bit(device, backend):
    """Beyond 8 outputs the CUDA kernel reads its columns again."""
    params, weights = normal(4, 1500, device=device), normal(11, 4, device=device, seed=1)
    theta, telemetry = run(backend, weights, params, base=1)
    for k, w in enumerate(weights):
        row, alone = run(backend, w, params, base=1)
        assert torch.equal(theta[k], row)
        assert telemetry.merged_norms[k] == alone.merged_norms
        assert torch.equal(telemetry.expert_norms, alone.expert_norms)


LEVELS = """
import hashlib, torch, neulig_fast as nf
g = torch.Generator().manual_seed(0)
nf._registry.forcing = ({None: "cpu"},)
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for n in (1, 6, 13):
        params = (3e4 * torch.randn(n, 5003, generator=g)).to(dtype)
        params[0, 7] = float("nan")
        weights = torch.randn(2, 2, n, generator=g)
        for out in (torch.float16, torch.float64):
            theta, t = nf.blend_telemetry(weights, params, [0, 999, 5003], out)
            flat = [theta.nan_to_num().view(torch.uint8), *(x.nan_to_num() for x in t)]
            for x in flat:
                data = x.contiguous().view(torch.uint8).numpy().tobytes()
                print(hashlib.sha256(data).hexdigest())
"""


def test_every_instruction_level_gives_the_same_bits(python):
    if OPS["blend_telemetry"].why_not("cpu", "cpu") is not None:
        pytest.skip("no native extension")
    found = []
    for level in ("0", "3", "4"):
        done = python(LEVELS, NEULIG_FAST_CPU=level)
        if "the best level this CPU and build support" not in done.stderr:
            assert done.returncode == 0, done.stderr
            found.append(done.stdout)
    assert len(set(found)) == 1 and found[0]


# -- shapes and errors ---------------------------------------------------------------------------


@on_every_backend
def test_dimensions_follow_weights_and_segments(device, backend):
    params = normal(2, 6, device=device)
    for outputs in ((), (3,)):
        for count, bounds in (((), None), ((2,), [0, 4, 6])):
            weights = normal(*outputs, *count, 2, device=device)
            theta, telemetry = run(backend, weights, params, bounds)
            assert theta.shape == (*outputs, 6)
            assert telemetry.nonfinite.shape == telemetry.saturated.shape == (*outputs, *count)
            assert telemetry.merged_norms.shape == (*outputs, *count)
            assert telemetry.expert_norms.shape == (*count, 2)
            assert telemetry.sign_conflicts.shape == telemetry.columns.shape == count


@on_every_backend
def test_no_columns_no_segments_no_outputs(device, backend):
    theta, telemetry = run(
        backend, torch.ones(0, 3, device=device), normal(3, 0, device=device), [0]
    )
    assert theta.shape == (0,) and telemetry.expert_norms.shape == (0, 3)
    theta, telemetry = run(backend, torch.ones(0, 3, device=device), normal(3, 5, device=device))
    assert theta.shape == (0, 5) and (telemetry.expert_norms > 0).all()
    assert telemetry.nonfinite.shape == (0,)


@on_every_backend
def test_rows_further_apart_than_two_to_the_31_elements(device, backend):
    stride = 2**31 + 64
    buffer = torch.empty(stride + 1000, device=device)  # of which four pages are touched
    params = buffer.as_strided((2, 1000), (stride, 1))
    params[0], params[1] = 1.0, 2.0
    theta, telemetry = run(backend, torch.ones(2, device=device), params, base=0)
    assert theta.tolist() == [3.0] * 1000 and float(telemetry.expert_norms[1]) == math.sqrt(1000)


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3), torch.ones(2, 4)), r"weights must be \(N,\) or \(K, N\).*got \(3,\)"),
        ((torch.ones(2), torch.ones(2, 4), None, torch.int8), "out_dtype must be fp32, bf16, fp16"),
        ((torch.ones(2), torch.ones(2, 4), None, None, 2), "row of params, 0 to 1, got 2"),
        ((torch.ones(2), torch.ones(2, 4), None, None, -1), "row of params, 0 to 1, got -1"),
        ((torch.ones(2), torch.ones(2, 4).long()), "params must be fp32, bf16, fp16 or fp64"),
        ((torch.ones(1, 2), torch.ones(2, 4), [0, 3]), "segments must ascend from 0 to P = 4"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=f"blend_telemetry: .*{message}"):
        neulig_fast.blend_telemetry(*args)


@pytest.mark.parametrize(
    "extra, message",
    [
        ((None, torch.int8, None), "blend_telemetry: out_dtype must be float32"),
        ((None, None, 2), "blend_telemetry: base must be a row of params, 0 to 1, got 2"),
        ((torch.tensor([0, 3]), None, None), r"blend_telemetry: weights must be \(S, N\)"),
    ],
)
def test_the_native_room_checks_for_itself(extra, message):
    if OPS["blend_telemetry"].why_not("cpu", "cpu") is not None:
        pytest.skip("no native extension")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.neulig_fast_C.blend_telemetry(torch.ones(2), torch.ones(2, 4), *extra)


def test_columns_apart_run_on_the_reference():
    params = normal(6, 3).T
    theta, _ = run("torch", torch.ones(3), params)
    assert theta.shape == (6,)
    if OPS["blend_telemetry"].why_not("cpu", "cpu") is not None:
        pytest.skip("the C++ extension is not built")
    with pytest.raises(RuntimeError, match="columns are not contiguous"):
        run("cpu", torch.ones(3), params)

"""cross_moments beyond test_house.py: closed forms, layouts, large means, bits, NaN, errors."""

import importlib.util

import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS

OP = OPS["cross_moments"]
DEVICES = testing.devices()
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
needs_cpu = pytest.mark.skipif(("cpu", "cpu") not in BACKENDS, reason="no native cpu backend")


def run(backend, *args):
    with neulig_fast.use_backend(cross_moments=backend):
        return neulig_fast.cross_moments(*args)


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(device, dtype)


def exact(x, y, x_shift=None, y_shift=None):
    """Term by term in fp64, from the definition."""
    a, b = x.double().flatten(0, -2), y.double().flatten(0, -2)
    if x_shift is not None:
        a = a - x_shift.double()
    if y_shift is not None:
        b = b - y_shift.double()
    sums = (torch.einsum(f, *[z] * n) for z in (a, b) for n, f in ((1, "ti->i"), (2, "ti,ti->i")))
    return torch.einsum("ti,tj->ij", a, b), *sums


def assert_close(got, *args):
    x, y, *shifts = args
    three = (x, y) if x.ndim == 3 else (x[None], y[None])
    working, terms = OP.reference(*three, *shifts), x.shape[:-1].numel()
    for result, at_dtype, oracle in zip(got, working, exact(*args), strict=True):
        testing.assert_within_rule(result, at_dtype, oracle, terms=max(terms, 1))


def interpreted(backend, device):
    """Whether a call takes tenths of a second, so that few of them must do."""
    return (backend, device) == ("triton", "cpu")


def rows_for(backend, device):
    """Enough rows for several blocks, chunks and slices; few where Triton is interpreted."""
    return 70 if interpreted(backend, device) else 2500


# -- what it computes -----------------------------------------------------------------------------


@on_every_backend
def test_two_rows_by_hand(device, backend):
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], device=device)
    y = torch.tensor([[10.0], [20.0]], device=device)
    got = run(backend, x, y, torch.tensor([1.0, 4.0], device=device), None)
    assert got.cross.tolist() == [[40.0], [0.0]]  # 0 10 + 2 20, -2 10 + 1 20
    assert got.x_sum.tolist() == [2.0, -1.0] and got.x_square.tolist() == [4.0, 5.0]
    assert got.y_sum.tolist() == [30.0] and got.y_square.tolist() == [500.0]


@on_every_backend
def test_orthogonal_patterns_have_exact_products(device, backend):
    """Walsh functions: a diagonal of T, zeros elsewhere, whatever the order of the sums."""
    H = torch.ones(1, 1, device=device)
    for _ in range(6):
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    got = run(backend, H, H[:, 5:40])
    assert torch.equal(got.cross, 64 * torch.eye(64, device=device)[:, 5:40])
    assert torch.equal(got.x_sum, 64 * torch.eye(64, device=device)[0])
    assert got.x_square.eq(64).all() and got.y_square.eq(64).all() and not got.y_sum.any()


@in_every_dtype
@on_every_backend
def test_every_size_obeys_the_rule(device, backend, dtype):
    slow = interpreted(backend, device)
    most = rows_for(backend, device)
    for T, X, Y in [(most, 33, 70)] if slow else [(most, 33, 290), (257, 1, 64), (1, 130, 2)]:
        x, y = (normal(T, n, device=device, dtype=dtype, seed=n) for n in (X, Y))
        a, b = normal(X, device=device), normal(Y, device=device, dtype=dtype)
        for shifts in [(None, b)] if slow else [(a, b), (None, None), (None, b)]:
            assert_close(run(backend, x, y, *shifts), x, y, *shifts)


@on_every_backend
def test_a_mean_a_thousand_times_the_spread(device, backend):
    """With shifts, correlations keep their digits; without, fp32 sums lose them."""
    T = rows_for(backend, device)
    base = normal(T, 12, seed=1)
    x = (1000 + base).to(device)
    y = (-1000 + base.flip(1) + 0.5 * normal(T, 12, seed=2)).to(device)
    z = torch.cat([x, y], 1).double()
    expected = torch.corrcoef(z.T)[:12, 12:]

    def correlation(m):
        cov = m.cross.double() / T - (m.x_sum.double() / T)[:, None] * (m.y_sum.double() / T)
        variances = (m.x_square, m.x_sum), (m.y_square, m.y_sum)
        sx, sy = ((q.double() / T - (s.double() / T) ** 2).abs().sqrt() for q, s in variances)
        return cov / (sx[:, None] * sy)

    shifted = run(backend, x, y, x[:8].mean(0), y[:8].mean(0))
    error = (correlation(shifted) - expected).abs().max()
    naive = (correlation(run(backend, x, y)) - expected).abs().max()
    assert error < 64 * torch.finfo(torch.float32).eps < naive


@on_every_backend
def test_correlations_do_not_depend_on_the_shift(device, backend):
    x, y = normal(50, 4, dtype=torch.float64).to(device), normal(50, 3, seed=1).double().to(device)
    for a, b in ((x.mean(0), y.mean(0)), (normal(4, seed=2).to(device), None)):
        m = run(backend, x, y, a, b)
        cov = m.cross / 50 - torch.outer(m.x_sum, m.y_sum) / 2500
        torch.testing.assert_close(cov, torch.cov(torch.cat([x, y], 1).T, correction=0)[:4, 4:])
        torch.testing.assert_close(m.x_square / 50 - (m.x_sum / 50) ** 2, x.var(0, correction=0))


@on_every_backend
def test_of_itself_it_is_symmetric_with_squares_on_the_diagonal(device, backend):
    x, a = normal(90, 37, device=device), normal(37, device=device, seed=1)
    got, oracle = run(backend, x, x, a, a), exact(x, x, a, a)
    testing.assert_within_rule(got.cross.T, got.cross, oracle[0], terms=90)
    testing.assert_within_rule(got.cross.diagonal(), got.x_square, oracle[2], terms=90)
    assert torch.equal(got.x_sum, got.y_sum) and torch.equal(got.x_square, got.y_square)


@on_every_backend
def test_batches_add_up_to_the_whole(device, backend):
    x, y = normal(6, 11, 5, dtype=torch.float64), normal(6, 11, 4, dtype=torch.float64, seed=1)
    x, y, a = x.to(device), y.to(device), normal(5, device=device)
    parts = [run(backend, x[i : i + 2], y[i : i + 2], a) for i in (0, 2, 4)]
    whole = run(backend, x.flatten(0, 1), y.flatten(0, 1), a)
    for i, expected in enumerate(whole):
        torch.testing.assert_close(sum(part[i] for part in parts), expected)


@on_every_backend
def test_nothing_to_add_up(device, backend):
    for x, y in ((normal(0, 3), normal(0, 2)), (normal(2, 0, 3), normal(2, 0, 2))):
        got = run(backend, x.to(device), y.to(device), torch.ones(3, device=device))
        assert got.cross.shape == (3, 2) and not any(result.any() for result in got)
    got = run(backend, normal(5, 0, device=device), normal(5, 2, device=device))
    assert got.cross.shape == (0, 2) and got.x_sum.shape == (0,)
    assert_close(got, normal(5, 0, device=device), normal(5, 2, device=device))


# -- layouts --------------------------------------------------------------------------------------


def layouts(device, dtype):
    """Pairs with other strides than rows of units one after the other."""
    maps, more = (normal(3, c, 7, 7, device=device, dtype=dtype) for c in (33, 20))
    yield maps.flatten(2).mT, more.flatten(2).mT  # channels of convolutions
    tokens = normal(4, 11, 40, device=device, dtype=dtype)
    yield tokens[:, 1:, 3:36], tokens[:, 1:, ::2]  # without the class token; every other unit
    yield tokens[:, :1, :35], tokens[:, 0, None, 5:]  # the class token
    yield tokens.transpose(0, 1), tokens.transpose(0, 1)[:, :, 1:]
    one = normal(1, 1, 18, device=device, dtype=dtype)
    yield one.expand(3, 10, 18), tokens[1:, 1:].flip(0)  # the same row again and again


@in_every_dtype
@on_every_backend
def test_any_strides(device, backend, dtype):
    slow = interpreted(backend, device) and dtype != torch.float32
    for x, y in list(layouts(device, dtype))[: 2 if slow else None]:
        a, b = (normal(z.shape[2], device=device, seed=z.shape[2]) for z in (x, y))
        got = run(backend, x, y, a, b)
        assert_close(got, x, y, a, b)
        if backend == "cpu":  # which makes the same blocks of all layouts
            flat = (z.contiguous().flatten(0, 1) for z in (x, y))
            assert all(map(torch.equal, got, run(backend, *flat, a, b)))


@on_every_backend
def test_rows_further_apart_than_two_to_the_31_elements(device, backend):
    stride = 2**31 + 64
    buffer = torch.empty(stride + 3, device=device)  # of which two pages are touched
    x = buffer.as_strided((2, 3), (stride, 1))
    x[0], x[1] = 1.0, 2.0
    got = run(backend, x, x)
    assert got.cross.eq(5).all() and got.x_sum.eq(3).all() and got.y_square.eq(5).all()


# -- values that are no numbers, and bits ---------------------------------------------------------


@on_every_backend
def test_what_is_not_finite_stays_with_its_unit(device, backend):
    x, y = normal(40, 20, device=device), normal(40, 35, device=device, seed=1)
    a, b = torch.ones(20, device=device), torch.ones(35, device=device)
    clean = run(backend, x, y, a, b)
    for value in (float("nan"), float("inf"), float("-inf")):
        broken = x.clone()
        broken[7, 3] = value
        got, others = run(backend, broken, y, a, b), torch.arange(20, device=device) != 3
        assert not got.cross[3].isfinite().any() and not got.x_sum[3].isfinite()
        assert not got.x_square[3].isfinite()
        for result, expected in zip(got[:3], clean[:3], strict=True):
            assert torch.equal(result[others], expected[others])
        assert torch.equal(got.y_sum, clean.y_sum) and torch.equal(got.y_square, clean.y_square)


@needs_cpu
def test_bits_do_not_depend_on_threads():
    x, y = normal(2100, 300), normal(2100, 131, seed=1)
    shift, threads, seen = x[:50].mean(0), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            seen.append(run("cpu", x, y, shift))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 3])
def test_lower_instruction_sets_obey_the_rule(python, level):
    from neulig_fast import _C

    if level >= _C.cpu_level():
        pytest.skip(f"level {_C.cpu_level()} is what the other tests run at")
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import test_cross_moments as t\n"
        "for dtype in t.testing.DTYPES:\n"
        "    t.test_every_size_obeys_the_rule('cpu', 'cpu', dtype)\n"
        "    t.test_any_strides('cpu', 'cpu', dtype)\n"
    )
    done = python(code, NEULIG_FAST_CPU=str(level))
    assert done.returncode == 0, done.stderr


# -- Triton ---------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_adds_up_slices_of_the_rows():
    from neulig_fast.kernels import _launch, cross_moments
    from neulig_fast.kernels._tiles import Tile

    device = "cpu" if _launch.INTERPRETED else "cuda"
    if _launch.missing(device) is not None or device not in DEVICES:
        pytest.skip("neither Triton's interpreter nor a GPU")
    x, y, a = (normal(*s, device=device) for s in ((3, 100, 16), (3, 100, 7), (16,)))
    tile = Tile(16, 16, 16, num_warps=1, stages=1)
    for pair in ((x, y), (x[:, 1:], y[:, 1:])):  # in one run of 300 rows, and sample by sample
        got = cross_moments.cross_moments(*pair, a, None, tile)
        assert_close(got, *pair, a)
    launch = cross_moments.launches(x, y, a, None, got, tile)[0]
    assert launch.arguments[4].shape[0] == 2 and launch.options["STEPS"] == 10


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_rows_are_cut_where_a_gpu_would_be_idle_and_nowhere_else():
    from neulig_fast.kernels._tiles import row_slices

    assert row_slices(4, 0) == 1 and row_slices(4, 7) == 1 and row_slices(600, 10_000) == 1
    assert row_slices(4, 10_000) == 64 and row_slices(4, 80) == 10


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3), torch.ones(3, 2)), r"x and y must be \(T, X\) .*got \(3,\) and \(3, 2\)"),
        ((torch.ones(3, 2), torch.ones(1, 3, 2)), r"got \(3, 2\) and \(1, 3, 2\)"),
        ((torch.ones(3, 2), torch.ones(4, 2)), r"got \(1, 3, 2\) and \(1, 4, 2\)"),
        ((torch.ones(3, 2).int(), torch.ones(3, 2).int()), "x must be fp32, bf16, fp16 or fp64"),
        ((torch.ones(3, 2), torch.ones(3, 2).half()), "y must be torch.float32 like x"),
        (
            (torch.ones(3, 2), torch.ones(3, 2), torch.ones(3)),
            r"x_shift must be \(2,\), got \(3,\)",
        ),
        (
            (torch.ones(3, 2), torch.ones(3, 2), None, torch.ones(2).double()),
            "y_shift must be torch.float32 or a float type it holds, got torch.float64",
        ),
        ((torch.ones(3, 2).to_sparse(), torch.ones(3, 2)), "x must be dense"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=f"cross_moments: (.|\n)*{message}"):
        neulig_fast.cross_moments(*args)


def test_every_fault_is_listed():
    with pytest.raises(ValueError, match="3 problems") as error:
        neulig_fast.cross_moments(
            torch.ones(3, 2), torch.ones(4, 2).half(), torch.ones(2), torch.ones(2).int()
        )
    for part in ("x and y must be", "y must be torch.float32", "y_shift must be torch.float32"):
        assert part in str(error.value)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="y must be a tensor, got list"):
        neulig_fast.cross_moments(torch.ones(3, 2), [[1.0]])
    with pytest.raises(TypeError, match="y_shift must be a tensor, got float"):
        neulig_fast.cross_moments(torch.ones(3, 2), torch.ones(3, 2), None, 1.0)


@needs_cpu
@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3, 2), torch.ones(3, 2)), r"x must be \(B, T, X\) and y \(B, T, Y\)"),
        ((torch.ones(1, 3, 2), torch.ones(1, 3, 2).double()), "y must be Float like x"),
        ((torch.ones(1, 3, 2).int(), torch.ones(1, 3, 2).int()), "x must be float32, bfloat16"),
        ((torch.ones(1, 3, 2), torch.ones(1, 3, 2), torch.ones(1)), "x_shift must be contiguous"),
        ((torch.ones(1, 3, 2), torch.ones(1, 3, 2), None, torch.ones(2).half()), "y_shift must be"),
    ],
)
def test_the_native_twin_has_its_own_door(args, message):
    with pytest.raises(RuntimeError, match=f"cross_moments: {message}"):
        torch.ops.neulig_fast_C.cross_moments(*args)

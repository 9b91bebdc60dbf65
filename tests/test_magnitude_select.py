"""magnitude_select beyond test_house.py: what is kept, hostile inputs, bits, tiles, errors."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

import neulig_fast
from neulig_fast import _checks, testing
from neulig_fast._registry import OPS
from neulig_fast.methods._selection import TiledSelect

ROOT = Path(__file__).resolve().parents[1]
OP = OPS["magnitude_select"]
DEVICES = testing.devices()
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
needs_cpu = pytest.mark.skipif(("cpu", "cpu") not in BACKENDS, reason="no native cpu backend")


def run(backend, params, counts, base=None):
    counts = torch.tensor(counts, device=params.device)
    with neulig_fast.use_backend(magnitude_select=backend):
        return neulig_fast.magnitude_select(params, counts, base)


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn.to(device, dtype)


def exact(params, counts, base=None):
    """From the definition: all magnitudes in order, by NumPy."""
    wide = np.float64 if params.dtype == torch.float64 else np.float32
    acc = _checks.accumulation_dtype(params.dtype)
    rows = params.detach().cpu().to(acc).numpy()
    if base is not None:
        with np.errstate(all="ignore"):
            rows = rows - base.cpu().to(acc).numpy()
    thresholds, cuts = [], []
    for d, count in zip(np.abs(rows), counts, strict=True):
        known = np.flatnonzero(~np.isnan(d))
        order = known[np.lexsort((known, -d[known]))]
        if min(count, len(d)) == 0:
            threshold, cut = np.inf, 0
        elif count >= len(order):
            threshold, cut = -1, 0
        else:
            threshold, cut = d[order[count - 1]], order[count - 1] + 1
        thresholds.append(threshold)
        cuts.append(int(cut))
    return torch.tensor(np.array(thresholds, wide)), torch.tensor(cuts)


def assert_exact(got, *args):
    for result, expected in zip(got, exact(*args), strict=True):
        assert result.dtype == expected.dtype
        assert torch.equal(result.cpu(), expected), (result, expected)


def interpreted(backend, device):
    """Whether a call takes tenths of a second, so that few of them must do."""
    return (backend, device) == ("triton", "cpu")


def width_for(backend, device):
    """Several chunks and a sample, or several blocks of Triton's; an odd number."""
    return 9001 if interpreted(backend, device) else 70_001


# -- what it computes -----------------------------------------------------------------------------


@on_every_backend
def test_by_hand(device, backend):
    params = torch.tensor([[1.0, -3.0, 2.0, 3.0, 0.0]] * 7, device=device)
    got = run(backend, params, [0, 1, 2, 3, 4, 5, 9])
    assert got.thresholds.tolist() == [torch.inf, 3, 3, 2, 1, -1, -1]
    assert got.cuts.tolist() == [0, 2, 4, 3, 1, 0, 0]
    base = torch.tensor([1.0, -3.0, 1.0, 1.0, 1.0], device=device)  # 0 0 1 2 -1
    got = run(backend, params[:4], [1, 2, 3, 4], base)
    assert got.thresholds.tolist() == [2, 1, 1, 0] and got.cuts.tolist() == [4, 3, 5, 1]


@in_every_dtype
@on_every_backend
def test_exactly_so_many_are_kept_and_they_are_the_largest(device, backend, dtype):
    P = width_for(backend, device)
    params, base = normal(3, P, device=device, dtype=dtype), normal(P, dtype=dtype, seed=1)
    base, counts = base.to(device), [1, P // 2, P - 1]
    got = run(backend, params, counts, base)
    assert_exact(got, params, counts, base)
    acc = _checks.accumulation_dtype(dtype)
    d, place = (params.to(acc) - base.to(acc)).abs(), torch.arange(P, device=device)
    threshold, cut = got.thresholds[:, None], got.cuts[:, None]
    kept = ~(d <= threshold) | ((d == threshold) & (place < cut))
    assert kept.sum(1).tolist() == counts
    for row, mask in zip(d, kept, strict=True):
        assert row[mask].min() >= row[~mask].max()


def hostile(P, dtype):
    """Rows by name: what the sample, the bounds and the digits could stumble over."""
    x = normal(P, dtype=torch.float64)
    yield "normal", x
    yield "all zero, of both signs", torch.zeros(P) * x.sign()
    yield "all equal", torch.full((P,), -0.37)
    yield "three values", x.sign() * (x.abs() > 0.5)
    yield "few values", (x * 8).round() / 8
    yield "half zero", torch.where(x > 0, x, 0.0)
    yield "ascending", torch.arange(P) / P
    yield "one large", torch.zeros(P).index_fill_(0, torch.tensor(P // 3), 5)
    yield "one small", torch.ones(P).index_fill_(0, torch.tensor(P // 3), 0.25)
    yield "tensors of three scales", x * (10.0 ** torch.arange(3)).repeat_interleave(P // 3 + 1)[:P]
    yield "a period of 64", torch.where(torch.arange(P) % 64 < 2, 100 + x, x)
    tiny = torch.finfo(dtype).smallest_normal
    yield "subnormal", (x * 8).round() * (tiny / 64)
    yield "huge", x.sign() * torch.finfo(dtype).max * (x.abs() > 1)
    yield "inf", torch.where(x.abs() > 1, x * torch.inf, x)
    yield "NaN", torch.where(x.abs() > 1, torch.nan, x)
    yield "all NaN", torch.full((P,), torch.nan)
    yield "NaN of every kind", torch.where(x > 0, torch.where(x > 1, torch.nan, -torch.nan), x)
    yield "one number", torch.full((P,), torch.nan).index_fill_(0, torch.tensor(7), 2.0)


def counts_for(row):
    P, known = len(row), int((~row.isnan()).sum())
    some = {0, 1, 2, P // 50, P // 5, P // 2, 4 * P // 5, P - 1, P, P + 7, known, known + 1}
    return sorted(some | {max(known - 1, 0)})


@in_every_dtype
@on_every_backend
def test_hostile_rows(device, backend, dtype):
    slow = interpreted(backend, device)
    for name, row in hostile(width_for(backend, device), dtype):
        row, counts = row.to(device, dtype), counts_for(row)
        if slow:
            if name == "subnormal" and dtype == torch.bfloat16:
                continue  # which the interpreter does not widen as a GPU does
            counts = counts[1::4] if dtype == torch.float32 else counts[5:6]
        params = row.expand(len(counts), -1)
        print(name)  # which one it was
        assert_exact(run(backend, params, counts), params, counts)


@on_every_backend
def test_huge_differences_and_differences_that_are_not_numbers(device, backend):
    most, inf = torch.finfo(torch.float32).max, torch.inf
    params = torch.tensor([[most, -most, inf, inf, -inf, 1.0, 0.0]], device=device)
    base = torch.tensor([-most, most, inf, -inf, -inf, torch.nan, 2.0], device=device)
    # inf inf NaN inf NaN NaN 2
    for counts in ([1], [3], [4], [7]):
        assert_exact(run(backend, params, counts, base), params, counts, base)
    assert run(backend, params, [3], base).cuts.tolist() == [4]


@on_every_backend
def test_differences_of_close_16_bit_experts_are_full_of_ties(device, backend):
    P = width_for(backend, device)
    for dtype in (torch.bfloat16, torch.float16):
        base = normal(P, device=device, dtype=dtype)
        params = (base + 0.003 * normal(2, P, device=device, seed=1)).to(dtype)
        counts = [P // 5, P // 2]
        assert_exact(run(backend, params, counts, base), params, counts, base)


@on_every_backend
@pytest.mark.parametrize("P", [1, 2, 7, 8, 9, 31, 33, 2047, 2049, 4097])
def test_small_sizes(device, backend, P):
    if interpreted(backend, device) and P not in (1, 9, 4097):
        pytest.skip("one size of each kind is enough in Triton's interpreter")
    params, counts = normal(2, P, device=device), [P // 2 + 1, P - 1]
    assert_exact(run(backend, params, counts), params, counts)


@needs_cpu
@pytest.mark.parametrize("P", [16384, 16385, 32768, 32769, 65536, 131_075, 200_003])
def test_sizes_around_chunks_and_samples(P):
    params, base = normal(2, P, dtype=torch.bfloat16), normal(P, dtype=torch.bfloat16, seed=1)
    for counts in ([P // 2, P // 5], [3, P - 2]):
        assert_exact(run("cpu", params, counts, base), params, counts, base)


@on_every_backend
def test_nothing_to_select_from(device, backend):
    got = run(backend, torch.empty(3, 0, device=device), [0, 1, 5])
    assert got.thresholds.tolist() == [torch.inf] * 3 and got.cuts.tolist() == [0] * 3


# -- samples that mislead -------------------------------------------------------------------------


def sample_size(P):
    """How many places csrc/cpu/magnitude_select.cpp looks at first."""
    return int((P / 5) ** (2 / 3))


def sample_places(P, size):
    """Where csrc/cpu/magnitude_select.cpp looks first."""
    part = np.arange(size + 1)
    edges, bits = part * P // size, part[:-1].astype(np.uint64)
    with np.errstate(over="ignore"):
        bits += np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits ^= bits >> np.uint64(31)
    widths = np.diff(edges).astype(np.uint64)
    return torch.from_numpy(edges[:-1] + (bits % widths).astype(np.int64))


@needs_cpu
@in_every_dtype
@pytest.mark.parametrize("seen", [0.0, 0.5, 9.0], ids=["smaller", "equal", "larger"])
def test_a_sample_that_misleads_costs_time_only(seen, dtype):
    P = 70_001
    row = (normal(P, dtype=torch.float64) + 4).to(dtype)
    row[sample_places(P, sample_size(P))] = seen
    counts = [1, P // 5, P // 2, 4 * P // 5, P - 1]
    params = row.expand(len(counts), -1)
    assert_exact(run("cpu", params, counts), params, counts)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_more_candidates_than_are_kept(dtype):
    P = 300_007
    row = 1 + 0.001 * normal(P, dtype=dtype)
    places = sample_places(P, sample_size(P))
    row[places] = torch.where(torch.arange(len(places)) % 2 == 0, 0.1, 5.0).to(dtype)
    half = len(places) // 2
    counts = [P // 2, P // 2 + 1, half, half + 1]
    params = row.expand(len(counts), -1)
    assert_exact(run("cpu", params, counts), params, counts)


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_wanted_magnitude_is_a_bound_by_chance(dtype):
    """Around both ends of what a sample leaves, one that it has once and other places twice."""
    P, size = 70_001, sample_size(70_001)
    places, count = sample_places(P, size), P // 2
    margin = 1 + 3.5 * size**0.5 / 2
    first, last = int(size / 2 - margin), int(size / 2 + margin)
    others = torch.ones(P, dtype=torch.bool).index_fill_(0, places, False).nonzero().flatten()
    sample, rows = torch.linspace(2, 1, size, dtype=dtype), []
    for j, tie in itertools.product(
        (*range(first - 5, first + 5), *range(last - 5, last + 6)), range(3)
    ):
        row = torch.zeros(P, dtype=dtype)
        row[places] = sample
        row[others[1 : count - j - tie]] = 3
        row[others[0]] = row[P - 1] = sample[j]
        rows.append(row)
    params, counts = torch.stack(rows), [count] * len(rows)
    assert_exact(run("cpu", params, counts), params, counts)


@needs_cpu
def test_the_sample_is_where_it_is_thought_to_be():
    source = (ROOT / "csrc/cpu/magnitude_select.cpp").read_text()
    for line in ("kWhole = 16384;", "(columns) / 5, 2.0 / 3)", "0xBF58476D1CE4E5B9u"):
        assert line in source
    places = sample_places(1000, 125)
    assert torch.equal(places // 8, torch.arange(125)) and len(set((places % 8).tolist())) == 8


# -- layouts, threads, instruction sets -----------------------------------------------------------


@in_every_dtype
@on_every_backend
def test_strided_rows_and_odd_starts(device, backend, dtype):
    P = 5003 if interpreted(backend, device) else 40_003
    params, base = normal(4, P, device=device, dtype=dtype), normal(P, dtype=dtype, seed=1)
    base, counts = base.to(device), [P // 3, P // 2]
    for rows, start in ((params[::2, 3:], base[3:]), (params[1:3, 1:-4], base[5:])):
        got = run(backend, rows, counts, start)
        assert_exact(got, rows.contiguous(), counts, start)


@on_every_backend
def test_rows_further_apart_than_two_to_the_31_elements(device, backend):
    stride = 2**31 + 64
    buffer = torch.empty(stride + 3, device=device)  # of which two pages are touched
    params = buffer.as_strided((2, 3), (stride, 1))
    params[0], params[1] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([6.0, 5.0, 5.0])
    got = run(backend, params, [2, 2])
    assert got.thresholds.tolist() == [2, 5] and got.cuts.tolist() == [2, 2]


@needs_cpu
def test_memory_that_starts_at_an_odd_address():
    raw = bytearray(normal(20_001).numpy().tobytes() + b"\0")
    aligned = torch.frombuffer(raw, dtype=torch.float32, count=20_001)[None]
    odd = torch.frombuffer(bytearray(b"\0") + raw, dtype=torch.float32, count=20_001, offset=1)
    assert odd.data_ptr() % 4
    assert_exact(run("cpu", odd[None], [7000]), aligned, [7000])


@needs_cpu
def test_columns_that_are_not_contiguous_are_left_to_the_reference():
    params, base = normal(2, 40).T.contiguous().T, normal(80)[::2]
    assert "columns are not contiguous (stride 2)" in OP.why_not("cpu", "cpu", (params, None))
    reason = OP.why_not("cpu", "cpu", (normal(2, 40), None, base))
    assert reason == "base's columns are not contiguous (stride 2)"
    assert_exact(run("torch", params, [3, 9], base), params, [3, 9], base)


@needs_cpu
def test_results_do_not_depend_on_threads():
    P = 500_009
    params, base = normal(3, P, dtype=torch.bfloat16), normal(P, dtype=torch.bfloat16, seed=1)
    params[1], threads = (params[1] * 2).round(), torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            counts = [P // 2, P // 5, P // 3]
            assert_exact(run("cpu", params, counts, base), params, counts, base)
    finally:
        torch.set_num_threads(threads)


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("level", [0, 3])
def test_lower_instruction_sets_find_the_same(python, level):
    from neulig_fast import _C

    if level >= _C.cpu_level():
        pytest.skip(f"level {_C.cpu_level()} is what the other tests run at")
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import test_magnitude_select as t\n"
        "for dtype in t.testing.DTYPES:\n"
        "    t.test_hostile_rows('cpu', 'cpu', dtype)\n"
        "    t.test_strided_rows_and_odd_starts('cpu', 'cpu', dtype)\n"
        "    t.test_a_sample_that_misleads_costs_time_only(9.0, dtype)\n"
    )
    done = python(code, NEULIG_FAST_CPU=str(level))
    assert done.returncode == 0, done.stderr


# -- tile by tile ---------------------------------------------------------------------------------


def select_from_tiles(tiles, counts, bases, dtype):
    """What a program does whose tensors never lie in memory as a whole."""
    search = TiledSelect(counts, bits=8 * _checks.accumulation_dtype(dtype).itemsize)
    each = []
    while not search.done:
        prefix = torch.tensor(search.prefixes)
        each = [
            neulig_fast.magnitude_histogram(tile, prefix, search.digit, base)
            for tile, base in zip(tiles, bases, strict=True)
        ]
        search.advance(sum(each).tolist())
    ends, cuts = np.cumsum([tile.shape[1] for tile in tiles]).tolist(), []
    for i, last in enumerate(search.last_ties(each)):
        if last is None:
            cuts.append(0)
            continue
        tile, base = tiles[last.tile], bases[last.tile]
        d = tile[i].double() if base is None else tile[i].double() - base.double()
        if dtype != torch.float64:
            d = d.float()
        equal = (d.abs() == search.thresholds()[i]).nonzero()
        cuts.append(ends[last.tile] - tile.shape[1] + int(equal[last.rank - 1]) + 1)
    thresholds = torch.tensor(search.thresholds(), dtype=_checks.accumulation_dtype(dtype))
    return thresholds, cuts, search.all_ties()


@pytest.mark.parametrize("with_base", [False, True])
@in_every_dtype
def test_tiles_of_any_size_select_the_same(dtype, with_base):
    P = 3000
    rows = [*hostile(P, dtype)]
    params = torch.stack([row.to(dtype) for _, row in rows for _ in range(5)])
    base = normal(P, seed=3).to(dtype) if with_base else None
    counts = [k for _ in rows for k in (0, 1, P // 5, P - 1, P)]
    expected = neulig_fast.magnitude_select(params, torch.tensor(counts), base)
    acc = _checks.accumulation_dtype(dtype)
    d = (params.to(acc) - (0 if base is None else base.to(acc))).abs()
    tied = d == expected.thresholds[:, None]
    kept = tied & (torch.arange(P) < expected.cuts[:, None])
    for sizes in ([P], [1, P - 1], [700, 0, 1, 1299, 1000]):
        tiles = params.split(sizes, 1)
        bases = [None] * len(sizes) if base is None else base.split(sizes)
        thresholds, cuts, all_ties = select_from_tiles(tiles, counts, bases, dtype)
        assert torch.equal(thresholds, expected.thresholds)
        assert cuts == expected.cuts.tolist()
        some = expected.cuts > 0
        assert all_ties == (some & (tied == kept).all(1)).tolist()


# -- errors ---------------------------------------------------------------------------------------

KS = torch.tensor([1, 1])


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3), KS), r"params must be \(N, P\) with N >= 1, got \(3,\)"),
        ((torch.ones(2, 3).int(), KS), "params must be fp32, bf16, fp16 or fp64, got torch.int32"),
        ((torch.ones(2, 3), KS[:1]), r"counts must be \(N,\) = \(2,\), got \(1,\)"),
        ((torch.ones(2, 3), KS.int()), "counts must be int64, got torch.int32"),
        ((torch.ones(2, 3), KS, torch.ones(2)), r"base must be \(P,\) = \(3,\), got \(2,\)"),
        ((torch.ones(2, 3), KS, torch.ones(3).half()), "base must be torch.float32 like params"),
        ((torch.ones(2, 3), KS.to("meta")), "counts must be on cpu like params, got meta"),
        ((torch.ones(2, 3), KS, torch.ones(3, device="meta")), "base must be on cpu like params"),
        ((torch.ones(2, 3).to_sparse(), KS), "params must be dense"),
        ((torch.ones(2, 3), KS - 2), r"counts must not be negative, got \[-1, -1\]"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=f"magnitude_select: (.|\n)*{message}"):
        neulig_fast.magnitude_select(*args)


def test_every_fault_is_listed():
    with pytest.raises(ValueError, match="3 problems") as error:
        neulig_fast.magnitude_select(torch.ones(2, 3), KS[:1].int(), torch.ones(2))
    for part in ("counts must be (N,)", "counts must be int64", "base must be (P,)"):
        assert part in str(error.value)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="counts must be a tensor, got list"):
        neulig_fast.magnitude_select(torch.ones(2, 3), [1, 1])
    with pytest.raises(TypeError, match="base must be a tensor, got float"):
        neulig_fast.magnitude_select(torch.ones(2, 3), KS, 1.0)


@needs_cpu
@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3), KS), r"params must be \(N, P\)"),
        ((torch.ones(2, 3), KS.int()), "counts must be contiguous Long"),
        ((torch.ones(2, 3), KS, torch.ones(2)), r"base must be \(P,\) = \(3,\) of params' dtype"),
        ((torch.ones(2, 3), KS, torch.ones(3).half()), "base must be"),
        ((torch.ones(2, 3), KS, torch.ones(6)[::2]), "base must have stride 1"),
        ((torch.ones(2, 3), KS - 3), "counts must not be negative, got -2"),
    ],
)
def test_the_native_twin_has_its_own_door(args, message):
    with pytest.raises(RuntimeError, match=f"magnitude_select: {message}"):
        torch.ops.neulig_fast_C.magnitude_select(*args)

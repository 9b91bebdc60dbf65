"""What each thread of the CUDA kernels does, compiled for the CPU and run there, thread by thread.

No GPU is needed, only a C++ compiler and CUDA's headers (torch's CUDA wheels bring them).
"""

import ctypes
import os
import shutil
import site
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from neulig_fast.kernels.blend_telemetry import overflow_limit

from neulig_fast import testing
from neulig_fast.ops.blend import blend_reference
from neulig_fast.ops.blend_telemetry import blend_telemetry_reference
from neulig_fast.ops.blend_weight_grad import blend_weight_grad_reference

ROOT = Path(__file__).resolve().parents[1]
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FEW, MANY, SCALAR = 0, 1, 2  # the three paths of blend.cu
BLOCK = 4096  # kBlockColumns
SEGMENTS = [0, 0, 1, 40, 40, 40, 77, 130, 130]  # for 130 columns
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
I64, POINTER = ctypes.c_int64, ctypes.c_void_p


class BlendCall(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("weights", "params", "bounds", "theta")] + [
        (name, I64) for name in ("outputs", "segments", "experts", "columns", "row_stride")
    ]


class BlendWeightGradCall(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("grad", "params", "bounds", "partials", "result")] + [
        (name, I64)
        for name in (
            *("outputs", "segments", "experts", "columns", "grad_stride", "row_stride", "slots"),
        )
    ]


class BlendTelemetryCall(ctypes.Structure):
    _fields_ = (
        [(name, POINTER) for name in ("weights", "params", "bounds", "theta")]
        + [(name, POINTER) for name in ("square_partials", "count_partials")]
        + [(name, POINTER) for name in ("expert_squares", "merged_squares", "conflicts", "counts")]
        + [(name, I64) for name in ("outputs", "segments", "experts", "columns", "row_stride")]
        + [("slots", I64), ("base", I64), ("share", ctypes.c_double), ("limit", ctypes.c_double)]
        + [("out", ctypes.c_int)]
    )


class Piece(ctypes.Structure):
    _fields_ = [("block", I64), ("begin", I64), ("end", I64)]


class SlotRange(ctypes.Structure):
    _fields_ = [("begin", I64), ("end", I64)]


def cuda_headers():
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    wheels = [f"{folder}/nvidia/{name}" for folder in site.getsitepackages() for name in
              ("cu13", "cu12", "cuda_runtime")]  # fmt: skip
    folders = [Path(home, "include") for home in homes + wheels if home]
    return next((f for f in folders if (f / "cuda_bf16.h").exists()), None)


@pytest.fixture(scope="module")
def threads(tmp_path_factory):
    """The shared library of tests/cuda_on_cpu.cpp."""
    compiler, headers = shutil.which("c++"), cuda_headers()
    if not compiler or not headers:
        pytest.skip("no C++ compiler" if not compiler else "no CUDA headers")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "threads.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror"]
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(headers)]
    source = str(ROOT / "tests/cuda_on_cpu.cpp")
    command = [compiler, "-x", "c++", *flags, *includes, source, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.piece_of.argtypes = [POINTER, I64, I64, I64]
    loaded.piece_of.restype = Piece
    loaded.slots_of.argtypes = [POINTER, I64, I64, I64]
    loaded.slots_of.restype = SlotRange
    loaded.segment_of.argtypes = [POINTER, I64, I64]
    loaded.segment_of.restype = I64
    loaded.slot_count.argtypes = [I64, I64]
    loaded.slot_count.restype = I64
    loaded.blend_columns_from.argtypes = [ctypes.c_int, POINTER, ctypes.c_int, I64]
    return loaded


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def run_blend(threads, path, weights, params, segments=None, first=0):
    """theta (K, P) of weights (K, S, N), from column ``first`` on."""
    k, s, n = weights.shape
    theta = torch.empty(k, params.shape[1], dtype=params.dtype)
    call = BlendCall(
        *(pointer(t) for t in (weights, params, segments, theta)),
        *(k, s, n, params.shape[1], params.stride(0)),
    )
    element = ELEMENTS[params.dtype]
    threads.blend_columns_from(element, ctypes.addressof(call), path, first)
    return theta


def run_weight_grad(threads, grad, params, segments=None, wide=True, rows=1):
    (k, p), n, s = grad.shape, params.shape[0], 1 if segments is None else len(segments) - 1
    acc = accumulator(params.dtype)
    slots = threads.slot_count(p, s)
    partials, result = torch.full((k, n, slots), 1e9, dtype=acc), torch.empty(k, s, n, dtype=acc)
    call = BlendWeightGradCall(
        *(pointer(t) for t in (grad, params, segments, partials, result)),
        *(k, s, n, p, grad.stride(0), params.stride(0), slots),
    )
    element = ELEMENTS[params.dtype]
    threads.weight_grad(element, ctypes.byref(call), ctypes.c_bool(wide), rows)
    return result if segments is not None else result[:, 0]


# -- blend ---------------------------------------------------------------------------------------


@in_every_dtype
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n, paths", [*((n, (0, 1, 2)) for n in range(1, 9)), (9, (1, 2)),
                                      (16, (1, 2)), (17, (1, 2)), (64, (1, 2))])  # fmt: skip
def test_blend_gives_the_references_bits(threads, dtype, n, paths, k):
    weights, params = normal(k, 1, n, dtype=accumulator(dtype)), normal(n, 144, dtype=dtype, seed=1)
    expected = blend_reference(weights[:, 0], params)
    for path in paths:
        assert torch.equal(run_blend(threads, path, weights, params), expected), path


@in_every_dtype
@pytest.mark.parametrize("path", [FEW, MANY, SCALAR])
@pytest.mark.parametrize("p", [1, 17, 130])
def test_blend_with_segments_and_a_part_of_a_pack(threads, dtype, path, p):
    """Rows 16-byte aligned, width and bounds not: packs at cuts and at the end go by column."""
    segments = torch.tensor(SEGMENTS).clamp(max=p)
    params = normal(5, 160, dtype=dtype, seed=1)[:, :p]
    k = 1 if path != SCALAR else 2  # rows of theta are aligned only if there is one
    weights = normal(k, len(SEGMENTS) - 1, 5, dtype=accumulator(dtype))
    got = run_blend(threads, path, weights, params, segments)
    assert torch.equal(got, blend_reference(weights, params, segments))


def test_blend_beyond_2_to_the_31_columns(threads):
    """The last 70 of 2^31 + 70 columns; the other pages of 8.6 GB of addresses stay untouched."""
    tail, width = 70, 2**31 + 70
    try:
        params = torch.empty(width + 64, dtype=torch.bfloat16).as_strided((2, width), (64, 1))
        weights = normal(1, 3, 2)
        bounds = torch.tensor([0, 2**31 + 5, 2**31 + 43, width])
        params[1, -tail:] = normal(tail, dtype=torch.bfloat16)
        params[0, -tail - 8 :] = normal(tail + 8, dtype=torch.bfloat16, seed=1)
        for path in (FEW, MANY, SCALAR):
            theta = run_blend(threads, path, weights, params, bounds, first=2**31)
            local = torch.tensor([0, 5, 43, tail])
            expected = blend_reference(weights, params[:, -tail:], local)
            assert torch.equal(theta[:, -tail:], expected)
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        pytest.skip("no 8.6 GB of addresses")


# -- blend_weight_grad ---------------------------------------------------------------------------


@in_every_dtype
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("n, k, p", [(1, 1, 1), (3, 1, 5000), (9, 5, 17), (8, 4, 4097)])
def test_weight_grad_is_exact_where_sums_are(threads, dtype, rows, n, k, p):
    grad, params = integers(k, p, dtype=dtype), integers(n, p, dtype=dtype, seed=1)
    got = run_weight_grad(threads, grad, params, wide=False, rows=rows)
    assert torch.equal(got, blend_weight_grad_reference(grad, params))


@in_every_dtype
def test_weight_grad_per_segment_is_exact_where_sums_are(threads, dtype):
    segments = torch.tensor([0, 0, 3, 4096, 4096, 4100, 9000, 12288, 12300, 12300])
    grad = integers(1, 12300, dtype=dtype)
    params = integers(3, 12320, dtype=dtype, seed=1)[:, :12300]
    got = run_weight_grad(threads, grad, params, segments)
    assert torch.equal(got, blend_weight_grad_reference(grad, params, segments))


@in_every_dtype
def test_weight_grad_has_the_same_bits_however_columns_are_loaded(threads, dtype):
    segments = torch.tensor([0, 33, 6001, 10000])
    grad, params = normal(2, 10000, dtype=dtype), normal(3, 10000, dtype=dtype, seed=1)
    wide, narrow = (run_weight_grad(threads, grad, params, segments, w, 4) for w in (True, False))
    assert torch.equal(wide, narrow)
    one_by_one = [run_weight_grad(threads, g[None], params, segments) for g in grad]
    assert torch.equal(wide, torch.cat(one_by_one))
    oracle = blend_weight_grad_reference(grad.double(), params.double(), segments)
    working = blend_weight_grad_reference(grad, params, segments)
    testing.assert_within_rule(wide, working, oracle, terms=10000)


# -- blend_telemetry -----------------------------------------------------------------------------


def run_telemetry(threads, weights, params, segments, out_dtype, base, wide, few):
    """The op's results for weights (K, S, N); scratch and results start as garbage."""
    (k, s, n), p = weights.shape, params.shape[1]
    slots = threads.slot_count(p, s)
    theta = torch.full((k, p), 7, dtype=out_dtype)
    counts, conflicts = torch.full((2, k, s), 7), torch.full((s,), 7)
    squares = [
        torch.full(size, 7.0, dtype=torch.float64) for size in ((n + k, slots), (s, n), (k, s))
    ]
    count_partials = torch.full((1 + 2 * k, slots), 7, dtype=torch.int32)
    partials = (squares[0], count_partials)
    call = BlendTelemetryCall(
        *(pointer(t) for t in (weights, params, segments, theta, *partials, *squares[1:])),
        *(pointer(t) for t in (conflicts, counts)),
        *(k, s, n, p, params.stride(0), slots, -1 if base is None else base),
        *(1 / n, overflow_limit(out_dtype), ELEMENTS[out_dtype]),
    )
    element, flags = ELEMENTS[params.dtype], (ctypes.c_bool(wide), ctypes.c_bool(few))
    threads.telemetry(element, ctypes.byref(call), *flags)
    return theta, counts, *squares[1:], conflicts


def check_telemetry(threads, weights, params, segments, out_dtype=None, base=None):
    """All paths: the reference's bits and counts, its sums within the rule, one sum for all."""
    args = (weights, params, segments, out_dtype or params.dtype, base)
    expected = blend_telemetry_reference(*args)
    oracle = blend_telemetry_reference(*testing.cast(args, torch.float64))
    paths = [(True, False), (False, False)]  # wide, few
    paths += [(True, True), (False, True)] if params.shape[0] <= 8 else []
    before: tuple = ()
    for wide, few in paths:
        got = run_telemetry(threads, *args, wide, few)
        for index in (0, 1, 4):
            assert torch.equal(got[index].isnan(), expected[index].isnan()), (wide, few)
            assert torch.equal(got[index].nan_to_num(), expected[index].nan_to_num()), (wide, few)
        for index in (2, 3):
            exact = oracle[index]
            testing.assert_within_rule(got[index], expected[index], exact, params.shape[1])
        if not wide:
            assert all(
                torch.equal(a.nan_to_num(), b.nan_to_num())
                for a, b in zip(got, before, strict=True)
            )
        before = got


@in_every_dtype
@pytest.mark.parametrize("base", [None, 0])
@pytest.mark.parametrize("n, k", [*((n, 1) for n in range(1, 9)), (4, 9), (9, 2), (33, 1)])
def test_telemetry_on_every_path(threads, dtype, n, k, base):
    params = normal(n, 4240, dtype=dtype, seed=1)[:, :4224]
    segments = torch.tensor([0, 0, 7, 64, 4100, 4224, 4224])
    weights = normal(k, 6, n, dtype=accumulator(dtype))
    check_telemetry(threads, weights, params, segments, base=base)


@in_every_dtype
@pytest.mark.parametrize("out_dtype", testing.DTYPES, ids=str)
def test_telemetry_counts_what_the_output_cannot_hold(threads, dtype, out_dtype):
    params = normal(3, 144, dtype=dtype, seed=1)
    params[1, 3], params[2, 40] = float("inf"), float("nan")
    weights = 5e4 * normal(2, 1, 3, dtype=accumulator(dtype))
    check_telemetry(threads, weights, params, torch.tensor([0, 144]), out_dtype, 1)


# -- indices -------------------------------------------------------------------------------------


def check_pieces(threads, bounds):
    """The pieces of all slots tile the columns in order, each inside one block and its segment."""
    count, columns = len(bounds) - 1, bounds[-1]
    tensor = torch.tensor(bounds)
    slots, at = threads.slot_count(columns, count), 0
    for segment, (begin, end) in enumerate(pairwise(bounds)):
        found = threads.slots_of(pointer(tensor), count, slots, segment)
        at = begin
        for slot in range(found.begin, found.end):
            piece = threads.piece_of(pointer(tensor), count, columns, slot)
            assert piece.block % BLOCK == 0 and piece.begin == at < piece.end <= end
            assert piece.block <= piece.begin and piece.end <= piece.block + BLOCK
            at = piece.end
        assert at == end and found.end <= slots


def test_pieces_tile_the_columns(threads):
    check_pieces(threads, [0, 1])
    check_pieces(threads, [0, 0, 5, 5, 4096, 4096, 4097, 20000, 20000])
    generator = torch.Generator().manual_seed(3)
    for columns, cuts in ((50_000, 300), (5_000, 40), (40_000, 1)):
        inner = torch.randint(0, columns + 1, (cuts,), generator=generator).sort().values
        check_pieces(threads, [0, *inner.tolist(), columns])


def test_indices_beyond_2_to_the_31(threads):
    far = 2**42
    bounds = torch.tensor([0, 7, 2**31, 2**31 + 5000, far, far + 9])
    count, columns = 5, far + 9
    slots = threads.slot_count(columns, count)
    assert slots == far // BLOCK + 1 + 4
    for p, segment in ((0, 0), (2**31 - 1, 1), (2**31, 2), (far - 1, 3), (far + 8, 4)):
        assert threads.segment_of(pointer(bounds), count, p) == segment
    found = threads.slots_of(pointer(bounds), count, slots, 2)
    pieces = [threads.piece_of(pointer(bounds), count, columns, slot) for slot in
              range(found.begin, found.end)]  # fmt: skip
    assert [(p.begin - 2**31, p.end - 2**31) for p in pieces] == [(0, 4096), (4096, 5000)]
    last = threads.piece_of(pointer(bounds), count, columns, slots - 1)
    assert (last.block, last.begin, last.end) == (far, far, far + 9)


def test_wrong_bounds_harm_nothing(threads):
    """Bounds on a GPU are never checked: whatever they hold, every index stays inside."""
    generator = torch.Generator().manual_seed(4)
    columns = 9000
    for scale in (10, 20_000, 2**50):
        for count in (1, 2, 3, 7, 30):
            bounds = torch.randint(-scale, scale, (count + 1,), generator=generator)
            address, slots = pointer(bounds), threads.slot_count(columns, count)
            for p in (0, 1, 4096, columns - 1):
                assert 0 <= threads.segment_of(address, count, p) < count
            for slot in range(slots):
                piece = threads.piece_of(address, count, columns, slot)
                assert piece.begin >= piece.end or 0 <= piece.begin <= piece.end <= columns
            for segment in range(count):
                found = threads.slots_of(address, count, slots, segment)
                assert found.begin >= found.end or 0 <= found.begin <= found.end <= slots

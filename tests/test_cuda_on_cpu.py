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

from neulig_fast import testing
from neulig_fast.kernels.blend_telemetry import overflow_limit
from neulig_fast.ops._rounding import FORMATS
from neulig_fast.ops.blend import blend_reference
from neulig_fast.ops.blend_telemetry import blend_telemetry_reference
from neulig_fast.ops.blend_weight_grad import blend_weight_grad_reference
from neulig_fast.ops.offset_gram import offset_gram_reference

ROOT = Path(__file__).resolve().parents[1]
ELEMENTS = {
    dtype: index
    for index, dtype in enumerate(
        (
            *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
            *(torch.float8_e4m3fn, torch.float8_e5m2),
        )
    )
}
FEW, MANY, SCALAR = 0, 1, 2  # the three paths of blend.cu
BLOCK = 4096  # columns, for the tests of pieces.h
SEGMENTS = [0, 0, 1, 40, 40, 40, 77, 130, 130]  # for 130 columns
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
I64, POINTER = ctypes.c_int64, ctypes.c_void_p


class BlendCall(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("weights", "params", "bounds", "theta")] + [
        (name, I64)
        for name in (
            *("outputs", "segments", "experts", "columns", "row_stride", "theta_stride", "seed"),
        )
    ]
    _fields_ += [("out", ctypes.c_int), ("stochastic", ctypes.c_bool)]


class BlendWeightGradCall(ctypes.Structure):
    _fields_ = [(name, POINTER) for name in ("grad", "params", "bounds", "partials", "result")] + [
        (name, I64)
        for name in (
            *("outputs", "segments", "experts", "columns", "grad_stride", "row_stride", "slots"),
        )
    ]


class OffsetGramCall(ctypes.Structure):
    _fields_ = [
        (name, POINTER) for name in ("params", "bounds", "partials", "totals", "sums", "gram")
    ] + [
        (name, I64)
        for name in ("segments", "experts", "columns", "row_stride", "slots", "width", "rows")
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
def threads(once):
    """The shared library of tests/cuda_on_cpu.cpp."""
    compiler, headers = shutil.which("c++"), cuda_headers()
    if not compiler or not headers:
        pytest.skip("no C++ compiler" if not compiler else "no CUDA headers")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror"]
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(headers)]
    source = str(ROOT / "tests/cuda_on_cpu.cpp")

    def build(folder):
        command = [
            compiler,
            "-x",
            "c++",
            *flags,
            *includes,
            source,
            "-o",
            str(folder / "threads.so"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    loaded = ctypes.CDLL(str(once("cuda_on_cpu", build) / "threads.so"))
    loaded.piece_of.argtypes = [POINTER, *[I64] * 4]
    loaded.piece_of.restype = Piece
    loaded.slots_of.argtypes = [POINTER, *[I64] * 4]
    loaded.slots_of.restype = SlotRange
    loaded.segment_of.argtypes = [POINTER, I64, I64]
    loaded.segment_of.restype = I64
    loaded.slot_count.argtypes = [I64] * 3
    loaded.weight_grad_slots.argtypes = [I64] * 2
    loaded.slot_count.restype = loaded.weight_grad_slots.restype = I64
    loaded.gram_rows.argtypes, loaded.gram_rows.restype = [I64, ctypes.c_int], I64
    loaded.gram_width.argtypes, loaded.gram_width.restype = [I64, I64, ctypes.c_int], I64
    loaded.gram_slots.argtypes, loaded.gram_slots.restype = [I64, I64, I64], I64
    loaded.blend_columns_from.argtypes = [ctypes.c_int, POINTER, ctypes.c_int, I64]
    return loaded


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def accumulator(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def pointer(tensor):
    return None if tensor is None else tensor.data_ptr()


def run_blend(threads, path, weights, params, segments=None, first=0, dtype=None, seed=None):
    """theta (K, P) of weights (K, S, N), from column ``first`` on."""
    k, s, n = weights.shape
    dtype = dtype or params.dtype
    theta = torch.empty(k, params.shape[1], dtype=dtype)
    call = BlendCall(
        *(pointer(t) for t in (weights, params, segments, theta)),
        *(k, s, n, params.shape[1], params.stride(0), theta.stride(0), seed or 0),
        *(ELEMENTS[dtype], seed is not None),
    )
    element = ELEMENTS[params.dtype]
    threads.blend_columns_from(element, ctypes.addressof(call), path, first)
    return theta


def run_weight_grad(threads, grad, params, segments=None, wide=True):
    (k, p), n, s = grad.shape, params.shape[0], 1 if segments is None else len(segments) - 1
    acc = accumulator(params.dtype)
    slots = threads.weight_grad_slots(p, s)
    partials, result = torch.full((k, n, slots), 1e9, dtype=acc), torch.empty(k, s, n, dtype=acc)
    call = BlendWeightGradCall(
        *(pointer(t) for t in (grad, params, segments, partials, result)),
        *(k, s, n, p, grad.stride(0), params.stride(0), slots),
    )
    element = ELEMENTS[params.dtype]
    threads.weight_grad(element, ctypes.byref(call), ctypes.c_bool(wide))
    return result if segments is not None else result[:, 0]


def run_gram(threads, params, segments=None, wide=True, grouped=False, width=None):
    """sums (S, N) and gram (S, N, N), and what every entry was filled with before: NaN."""
    (n, p), s = params.shape, 1 if segments is None else len(segments) - 1
    element = ELEMENTS[params.dtype]
    rows = n if grouped else threads.gram_rows(n, element)
    width = width or threads.gram_width(p, n, element)
    if rows == n:
        width = min(width, 4096)  # a block of threads holds as many means
    count, slots = rows * (rows + 3) // 2, threads.gram_slots(p, s, width)
    partials = torch.full((count, slots), float("nan"), dtype=accumulator(params.dtype))
    totals, sums, gram = (
        torch.full(shape, float("nan"), dtype=torch.float64)
        for shape in ((s, count), (s, n), (s, n, n))
    )
    call = OffsetGramCall(
        *(pointer(t) for t in (params, segments, partials, totals, sums, gram)),
        *(s, n, p, params.stride(0), slots, width, rows),
    )
    threads.offset_gram(element, ctypes.byref(call), ctypes.c_bool(wide))
    return sums, gram


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


def bits(tensor):
    """The bits, with one NaN for all."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.where(tensor.isnan(), -1, tensor.view(integers[tensor.itemsize]).long())


@pytest.mark.parametrize("out", ELEMENTS, ids=str)
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_blend_from_any_type_to_any_type(threads, dtype, out):
    """Values over the whole range of the narrow types, subnormals and beyond included."""
    scale = torch.exp2(torch.randint(-18, 12, (5, 160), generator=torch.Generator().manual_seed(2)))
    params = (normal(5, 160, seed=1) * scale).to(dtype)[:, :130]
    weights = normal(1, len(SEGMENTS) - 1, 5, dtype=accumulator(dtype))
    segments = torch.tensor(SEGMENTS)
    for seed in (None, -7) if out in FORMATS else (None,):
        expected = blend_reference(weights, params, segments, out, seed)
        for path in (FEW, MANY, SCALAR) if seed is None else (MANY, SCALAR):
            got = run_blend(threads, path, weights, params, segments, dtype=out, seed=seed)
            assert torch.equal(bits(got), bits(expected)), (path, seed)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_output_row_is_rounded_with_its_own_words(threads, dtype):
    params, weights = normal(3, 144, seed=1), normal(4, 1, 3)
    expected = blend_reference(weights[:, 0], params, None, dtype, 2**40 + 3)
    for path in (MANY, SCALAR):
        got = run_blend(threads, path, weights, params, dtype=dtype, seed=2**40 + 3)
        assert torch.equal(bits(got), bits(expected))


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
@pytest.mark.parametrize("n, k, p", [*((n, k, 40) for n in range(1, 10) for k in (1, 2)),
                                     *((1, 1, 1), (3, 1, 20000), (9, 9, 17), (8, 8, 16385)),
                                     *((12, 1, 16385), (5, 4, 16385))])  # fmt: skip
def test_weight_grad_is_exact_where_sums_are(threads, dtype, n, k, p):
    """Every kernel; missing gradients and experts of a group do no harm."""
    grad, params = integers(k, p, dtype=dtype), integers(n, p, dtype=dtype, seed=1)
    got = run_weight_grad(threads, grad, params, wide=False)
    assert torch.equal(got, blend_weight_grad_reference(grad, params))


@in_every_dtype
def test_weight_grad_per_segment_is_exact_where_sums_are(threads, dtype):
    segments = torch.tensor([0, 0, 3, 16384, 16384, 16388, 30000, 49152, 49200, 49200])
    grad = integers(1, 49200, dtype=dtype)
    params = integers(3, 49216, dtype=dtype, seed=1)[:, :49200]
    got = run_weight_grad(threads, grad, params, segments)
    assert torch.equal(got, blend_weight_grad_reference(grad, params, segments))


@in_every_dtype
@pytest.mark.parametrize("k", [1, 2])
def test_weight_grad_has_the_same_bits_however_columns_are_loaded(threads, dtype, k):
    segments = torch.tensor([0, 33, 6001, 40000])
    grad, params = normal(k, 40000, dtype=dtype), normal(3, 40000, dtype=dtype, seed=1)
    wide, narrow = (run_weight_grad(threads, grad, params, segments, w) for w in (True, False))
    assert torch.equal(wide, narrow)
    oracle = blend_weight_grad_reference(grad.double(), params.double(), segments)
    working = blend_weight_grad_reference(grad, params, segments)
    testing.assert_within_rule(wide, working, oracle, terms=40000)


# -- offset_gram ---------------------------------------------------------------------------------


def assert_gram(got, params, segments=None):
    working = offset_gram_reference(params, segments)
    oracle = offset_gram_reference(params.double(), segments)
    for a, b, exact in zip(got, working, oracle, strict=True):
        eps = torch.finfo(accumulator(params.dtype)).eps
        testing.assert_within_rule(a, b, exact, terms=params.shape[1], eps=eps)


@in_every_dtype
@pytest.mark.parametrize("n", [*range(2, 18), 25, 64])
def test_gram_of_any_number_of_experts(threads, dtype, n):
    segments = torch.tensor([0, 0, 16, 1040, 1043, 1043, 2100])
    params = normal(n, 2112, dtype=dtype)[:, :2100]
    got = run_gram(threads, params, segments)
    assert_gram(got, params, segments)
    assert not got[1][[0, 4]].any() and torch.equal(got[1], got[1].mT)
    grouped = run_gram(threads, params, segments, grouped=True)
    assert_gram(grouped, params, segments)


@in_every_dtype
@pytest.mark.parametrize("n", [2, 5, 8, 9, 13, 16, 20])
def test_gram_has_the_same_bits_however_columns_are_loaded(threads, dtype, n):
    segments = torch.tensor([0, 33, 16384, 20000, 40000])
    params = normal(n, 40000, dtype=dtype)
    width = 16384 + 4096  # not a multiple of all that a block of threads has in flight
    wide, narrow = (run_gram(threads, params, segments, w, width=width) for w in (True, False))
    assert torch.equal(wide[0], narrow[0]) and torch.equal(wide[1], narrow[1])
    assert_gram(wide, params, segments)


@in_every_dtype
@pytest.mark.parametrize("n", [2, 8, 16, 20])
def test_gram_of_equal_experts_is_zero(threads, dtype, n):
    sums, gram = run_gram(threads, normal(1, 3000, dtype=dtype).expand(n, -1).contiguous())
    assert not sums.any() and not gram.any()


@pytest.mark.parametrize("p", [1, 130, 3 * 512 + 9, 9000])
@pytest.mark.parametrize("n", [9, 12, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gram_through_stages_by_hand(threads, dtype, n, p):
    """Expert i is i times a row of whole numbers: only the share of the mean is rounded, and that
    of 16 experts is not.

    Fewer packs than stages, one more, and many; segments that begin and end inside packs.
    """
    row = integers(p, dtype=torch.float64, seed=p)
    params = torch.zeros(n, p + -p % 8, dtype=dtype)[:, :p]  # rows stay aligned
    params.copy_(torch.arange(n, dtype=torch.float64).outer(row))
    segments = torch.tensor([0, 0, 5, 7, 1030, 1030, 8194, p]).clamp(max=p)
    parts = [row[begin:end] for begin, end in pairwise(segments.tolist())]
    offsets = torch.arange(n, dtype=torch.float64) - (n - 1) / 2
    sums = torch.stack([part.sum() * offsets for part in parts])
    gram = torch.stack([part.square().sum() * offsets.outer(offsets) for part in parts])
    for wide in (True, False):
        for got, exact in zip(run_gram(threads, params, segments, wide), (sums, gram), strict=True):
            eps = torch.finfo(torch.float64 if n == 16 else torch.float32).eps
            testing.assert_within_rule(got, exact, exact, eps=eps)


def test_gram_beyond_2_to_the_31_columns(threads):
    """Two rows 2^31 columns wide; the segments before the last 70 columns are empty but one."""
    tail, width = 70, 2**31 + 70
    try:
        params = torch.empty(width + 64, dtype=torch.bfloat16).as_strided((2, width), (64, 1))
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        pytest.skip("no 4.3 GB of addresses")
    params[0, -tail - 64 :] = normal(tail + 64, dtype=torch.bfloat16)
    params[1, -64:] = normal(64, dtype=torch.bfloat16, seed=1)
    last = params[:, -tail:].contiguous()
    slots = threads.gram_slots(width, 1, 4096)
    call = OffsetGramCall(*(None,) * 6, *(1, 2, width, params.stride(0), slots, 4096, 1))
    partials = torch.zeros(2, call.slots)
    call.params, call.partials = pointer(params), pointer(partials)
    threads.gram_last_slot(ctypes.byref(call), ctypes.c_bool(True))
    offset = (last[1].float() - last[0].float()) / 2
    expected = torch.stack([offset.sum(), offset.square().sum()])
    assert torch.allclose(partials[:, -1], expected, rtol=1e-5, atol=1e-5)


def test_gram_width_is_whole_packs_and_enough_pieces(threads):
    element = ELEMENTS[torch.float32]
    for columns in (1, 4096, 10**6, 151_277_313, 2**40):
        for n in (2, 8, 16, 17, 64):
            width = threads.gram_width(columns, n, element)
            assert 4096 <= width <= 32768 and width % 4096 == 0
    assert threads.gram_width(151_277_313, 5, element) == 32768
    assert threads.gram_width(151_277_313, 17, element) == 4096


# -- blend_telemetry -----------------------------------------------------------------------------


def run_telemetry(threads, weights, params, segments, out_dtype, base, wide, few):
    """The op's results for weights (K, S, N); scratch and results start as garbage."""
    (k, s, n), p = weights.shape, params.shape[1]
    slots = threads.slot_count(p, s, 16384)  # kTelemetryColumns
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
    slots, at = threads.slot_count(columns, count, BLOCK), 0
    for segment, (begin, end) in enumerate(pairwise(bounds)):
        found = threads.slots_of(pointer(tensor), count, slots, segment, BLOCK)
        at = begin
        for slot in range(found.begin, found.end):
            piece = threads.piece_of(pointer(tensor), count, columns, slot, BLOCK)
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
    slots = threads.slot_count(columns, count, BLOCK)
    assert slots == far // BLOCK + 1 + 4
    for p, segment in ((0, 0), (2**31 - 1, 1), (2**31, 2), (far - 1, 3), (far + 8, 4)):
        assert threads.segment_of(pointer(bounds), count, p) == segment
    found = threads.slots_of(pointer(bounds), count, slots, 2, BLOCK)
    pieces = [threads.piece_of(pointer(bounds), count, columns, slot, BLOCK) for slot in
              range(found.begin, found.end)]  # fmt: skip
    assert [(p.begin - 2**31, p.end - 2**31) for p in pieces] == [(0, 4096), (4096, 5000)]
    last = threads.piece_of(pointer(bounds), count, columns, slots - 1, BLOCK)
    assert (last.block, last.begin, last.end) == (far, far, far + 9)


def test_wrong_bounds_harm_nothing(threads):
    """Bounds on a GPU are never checked: whatever they hold, every index stays inside."""
    generator = torch.Generator().manual_seed(4)
    columns = 9000
    for scale in (10, 20_000, 2**50):
        for count in (1, 2, 3, 7, 30):
            bounds = torch.randint(-scale, scale, (count + 1,), generator=generator)
            address, slots = pointer(bounds), threads.slot_count(columns, count, BLOCK)
            for p in (0, 1, 4096, columns - 1):
                assert 0 <= threads.segment_of(address, count, p) < count
            for slot in range(slots):
                piece = threads.piece_of(address, count, columns, slot, BLOCK)
                assert piece.begin >= piece.end or 0 <= piece.begin <= piece.end <= columns
            for segment in range(count):
                found = threads.slots_of(address, count, slots, segment, BLOCK)
                assert found.begin >= found.end or 0 <= found.begin <= found.end <= slots

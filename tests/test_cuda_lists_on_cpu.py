"""What each thread of the CUDA kernels over lists does, compiled for the CPU and run there."""

import ctypes
import os
import shutil
import site
import subprocess
from pathlib import Path

import pytest
import torch

from neulig_fast import testing
from neulig_fast._registry import OPS
from neulig_fast.tensor_lists import TensorLists

ROOT = Path(__file__).resolve().parents[1]
ELEMENTS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
CHUNK = 2064  # a whole number of packs and not of sweeps of 256 threads
SHAPES = [(), (3, 0), (5, 3), (256,), (2063,), (2064,), (5001,)]
I64, POINTER, INT, BOOL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int, ctypes.c_bool
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)


def cuda_headers():
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    wheels = [f"{folder}/nvidia/{name}" for folder in site.getsitepackages() for name in
              ("cu13", "cu12", "cuda_runtime")]  # fmt: skip
    folders = [Path(home, "include") for home in homes + wheels if home]
    return next((f for f in folders if (f / "cuda_bf16.h").exists()), None)


@pytest.fixture(scope="module")
def threads(once):
    """The shared library of tests/cuda_lists_on_cpu.cpp."""
    compiler, headers = shutil.which("c++"), cuda_headers()
    if not compiler or not headers:
        pytest.skip("no C++ compiler" if not compiler else "no CUDA headers")
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wall", "-Werror"]
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(headers)]
    source = str(ROOT / "tests/cuda_lists_on_cpu.cpp")

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

    loaded = ctypes.CDLL(str(once("cuda_lists_on_cpu", build) / "threads.so"))
    loaded.blend_lists.argtypes = [INT, INT, POINTER, I64, POINTER, POINTER, I64, POINTER, I64,
                                   I64, BOOL]  # fmt: skip
    loaded.blend_lists_weight_grad.argtypes = [INT, INT, *[POINTER] * 5, BOOL]
    return loaded


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)


def accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)


def make_lists(n, dtype, shift, draw=normal):
    """N lists whose tensors are ``shift`` elements past a boundary of 64 bytes."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [
        [draw(64 + s, dtype=dtype, seed=7 * i + t)[shift : shift + s].view(SHAPES[t])
         for t, s in enumerate(sizes)]
        for i in range(n)
    ]  # fmt: skip


def run_blend(threads, weights, lists, outputs, many=False, first=0, last=None, chunk=CHUNK):
    (group,) = TensorLists(lists).groups
    table, chunks = group.table(chunk)
    addresses = torch.tensor([x.data_ptr() for x in outputs])
    sizes = (I64 * 4)(len(outputs), len(lists), chunk, chunks)
    weights = weights.to(accumulator(group.dtype))
    threads.blend_lists(
        ELEMENTS[group.dtype], ELEMENTS[outputs[0].dtype], weights.data_ptr(),
        len(lists) if weights.ndim == 2 else 0, table.data_ptr(), addresses.data_ptr(), 0, sizes,
        first, chunks if last is None else last, many,
    )  # fmt: skip
    return outputs


@in_every_dtype
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("n, many", [*((n, False) for n in range(1, 9)), (1, True), (9, True),
                                     (64, True)])  # fmt: skip
def test_blend_gives_the_references_bits(threads, dtype, n, many, shift):
    lists, weights = make_lists(n, dtype, shift), normal(len(SHAPES), n)
    got = run_blend(threads, weights, lists, [torch.empty_like(x) for x in lists[0]], many)
    expected = OPS["blend_lists"].reference(weights, [x for xs in lists for x in xs])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@in_every_dtype
@pytest.mark.parametrize("out", testing.DTYPES, ids=str)
def test_blend_rounds_to_every_type_and_writes_nothing_else(threads, dtype, out):
    lists, weights = make_lists(3, dtype, 0), normal(3)
    buffers = [torch.full((x.numel() + 64,), 7.0, dtype=out) for x in lists[0]]
    for shift in (0, 3):
        outputs = [b[shift : b.numel() - 64 + shift] for b in buffers]
        run_blend(threads, weights, lists, outputs)
        expected = OPS["blend_lists"].reference(weights, [x for xs in lists for x in xs], out)
        for got, x, buffer in zip(outputs, expected, buffers, strict=True):
            assert torch.equal(got, x.flatten())
            assert buffer[x.numel() + shift :].eq(7.0).all()
            buffer.fill_(7.0)


def test_blend_beyond_2_to_the_31_elements(threads):
    """The last 70 of 2^31 + 70 elements; other pages of the addresses stay untouched."""
    tail, width, chunk = 70, 2**31 + 70, 2**20
    try:
        buffers = [torch.empty(width, dtype=torch.bfloat16) for _ in range(3)]
    except RuntimeError as error:
        assert "allocate memory" in str(error)
        pytest.skip("no 13 GB of addresses")
    for i, x in enumerate(buffers[:2]):
        x[-tail:] = normal(tail, dtype=torch.bfloat16, seed=i)
    weights = normal(2)
    run_blend(threads, weights, [[buffers[0]], [buffers[1]]], buffers[2:], False, 2**11,
              chunk=chunk)  # fmt: skip
    (expected,) = OPS["blend_lists"].reference(weights, [x[-tail:] for x in buffers[:2]])
    assert torch.equal(buffers[2][-tail:], expected)


@in_every_dtype
@pytest.mark.parametrize("grad_dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("n, shift", [(1, 0), (5, 0), (5, 1), (8, 0), (11, 0)])
def test_weight_grad_is_exact_where_sums_are(threads, dtype, grad_dtype, n, shift):
    lists = make_lists(n, dtype, shift, integers)
    grads: list = make_lists(1, grad_dtype, shift, lambda *a, **k: integers(*a, **k) / 4)[0]
    grads[4] = None
    (group,) = TensorLists(lists).groups
    table, chunks = group.table(CHUNK)
    addresses = torch.tensor([0 if g is None else g.data_ptr() for g in grads])
    for rows in (len(SHAPES), 1):
        partials = torch.full((n, chunks), 1e9, dtype=accumulator(dtype))
        result = torch.empty(rows, n, dtype=torch.float64)
        sizes = (I64 * 4)(len(SHAPES), n, CHUNK, chunks)
        threads.blend_lists_weight_grad(
            ELEMENTS[dtype], ELEMENTS[grad_dtype], table.data_ptr(), addresses.data_ptr(), sizes,
            partials.data_ptr(), result.data_ptr(), rows > 1,
        )  # fmt: skip
        flat = [x for xs in lists for x in xs]
        weights = torch.empty(rows, n) if rows > 1 else torch.empty(n)
        expected = OPS["blend_lists_weight_grad"].reference(weights, grads, flat).double()
        assert torch.equal(result if rows > 1 else result[0], expected)

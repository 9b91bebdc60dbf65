"""offset_gram beyond test_house.py: closed forms, identities, small offsets, bits, errors."""

import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS
from neulig_fast.ops.offset_gram import offset_gram_reference

BACKENDS = testing.backends_of(OPS["offset_gram"])
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
needs_cpu = pytest.mark.skipif(("cpu", "cpu") not in BACKENDS, reason="no native cpu backend")


def run(backend, *args):
    with neulig_fast.use_backend(offset_gram=backend):
        return neulig_fast.offset_gram(*args)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close_experts(n, width, dtype=torch.float32, spread=0.05):
    """Experts that differ by ``spread`` times their size."""
    return (normal(1, width) + spread * normal(n, width, seed=1)).to(dtype)


def assert_close(got, params, segments=None):
    working = offset_gram_reference(params, segments)
    oracle = offset_gram_reference(params.double(), segments)
    eps = torch.finfo(torch.promote_types(params.dtype, torch.float32)).eps
    for a, b, exact in zip(got, working, oracle, strict=True):
        testing.assert_within_rule(a, b, exact, terms=params.shape[1], eps=eps)


def sizes(device, backend, dtype):
    """Numbers of experts to try; the interpreter takes seconds for the large ones."""
    if backend == "triton" and device == "cpu":
        every = {torch.float32: (1, 2, 9, 12), torch.bfloat16: (2, 13), torch.float64: (2, 10)}
        return every.get(dtype, (2, 4))  # in 16-byte loads, in narrower ones, in groups
    return (1, 2, 5, 8, 9, 10, 16, 17, 64)


@on_every_backend
def test_two_experts_by_hand(device, backend):
    sums, gram = run(backend, torch.tensor([[1.0, 4.0], [3.0, 0.0]], device=device))
    assert sums.tolist() == [[1.0, -1.0]]
    assert gram.tolist() == [[[5.0, -5.0], [-5.0, 5.0]]]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@on_every_backend
def test_any_number_of_experts(device, backend, dtype):
    for n in sizes(device, backend, dtype):
        params = close_experts(n, 300, dtype).to(device)[:, 8:265]
        bounds = torch.tensor([0, 0, 16, 17, 257], device=device)
        sums, gram = run(backend, params, bounds)
        assert_close((sums, gram), params, bounds)
        assert not gram[0].any() and not sums[0].any(), "an empty segment"


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@on_every_backend
def test_equal_experts_give_exact_zeros(device, backend, dtype):
    for n in sizes(device, backend, dtype):
        params = normal(1, 1001, dtype=dtype).to(device).expand(n, 1001)
        sums, gram = run(backend, params)
        assert not sums.any() and not gram.any()


@on_every_backend
def test_rows_sum_to_zero_and_the_matrix_is_positive_semidefinite(device, backend):
    n = 3 if backend == "triton" else 6
    _, gram = run(backend, normal(n, 20_000).to(device))
    scale = float(gram.abs().max())
    assert torch.equal(gram, gram.mT)
    assert float(gram.sum(-1).abs().max()) <= 1e-5 * scale
    assert float(torch.linalg.eigvalsh(gram[0].cpu()).min()) >= -1e-5 * scale


@on_every_backend
def test_segments_add_up_to_the_whole(device, backend):
    params = normal(3, 5000, dtype=torch.float64).to(device)
    sums, gram = run(backend, params, [0, 17, 17, 4096, 5000])
    whole_sums, whole_gram = run(backend, params)
    torch.testing.assert_close(sums.sum(0), whole_sums[0])
    torch.testing.assert_close(gram.sum(0), whole_gram[0])
    assert not gram[1].any()


@on_every_backend
def test_trace_identity_with_the_distances(device, backend):
    params = normal(4, 300, dtype=torch.float64).to(device)
    _, gram = run(backend, params)
    pairs = torch.pdist(params).square().sum()
    torch.testing.assert_close(gram[0].trace(), pairs / 4)


@on_every_backend
def test_offsets_far_smaller_than_the_parameters_keep_their_digits(device, backend):
    """Offsets a millionth of the parameters keep 4 digits; the naive formula loses them all."""
    params = close_experts(3, 8000, torch.float64, spread=1e-6).float().to(device)
    exact = params.double() - params.double().mean(0)
    exact = exact @ exact.T
    _, gram = run(backend, params)
    naive = params @ params.T
    naive = naive - naive.mean(0) - naive.mean(1, keepdim=True) + naive.mean()
    error = (gram[0] - exact).abs().max() / exact.abs().max()
    naive_error = (naive.double() - exact).abs().max() / exact.abs().max()
    assert error < 1e-4 < 1 < naive_error


@on_every_backend
def test_one_expert_far_from_the_others(device, backend):
    """The others' products keep their digits, whichever it is: they are compared without it, too.

    Centring totals of differences to expert 0 would leave them an error of 90 eps with the first
    one odd. With another, expert 0's may be what the others lack, the odd one among them.
    """
    n, eps = 16, torch.finfo(torch.float32).eps
    for odd, most in ((0, 16 * eps), (3, 8 * n * eps)):
        params = close_experts(n, 3000, spread=1e-3).to(device)
        params[odd] = normal(3000, seed=5)
        got, exact = run(backend, params), offset_gram_reference(params.double())[1][0]
        assert_close(got, params)
        others = [i for i in range(n) if i != odd]
        exact = exact[others][:, others]
        error = (got[1][0][others][:, others] - exact).abs().max()
        assert error < most * exact.abs().max(), odd


@on_every_backend
def test_one_expert_is_its_own_mean_whatever_it_holds(device, backend):
    params = torch.tensor([[1.0, torch.nan, torch.inf, 2.0]], device=device)
    for result in run(backend, params, params.new_tensor([0, 2, 4]).long()):
        assert result.eq(0).all()


@on_every_backend
def test_a_nan_or_infinity_stays_in_its_segment(device, backend):
    for value in (float("nan"), float("inf"), float("-inf")):
        for expert in (0, 2):
            params = normal(3, 100).to(device)
            params[expert, 50] = value
            sums, gram = run(backend, params, [0, 50, 51, 100])
            clean = run(backend, normal(3, 100).to(device), [0, 50, 51, 100])
            assert not sums[1].isfinite().any() and not gram[1].isfinite().any()
            for segment in (0, 2):
                assert torch.equal(gram[segment], clean[1][segment])
                assert torch.equal(sums[segment], clean[0][segment])


@on_every_backend
def test_rows_further_apart_than_two_to_the_31_elements(device, backend):
    stride = 2**31 + 64
    buffer = torch.empty(stride + 1000, device=device)  # of which four pages are touched
    params = buffer.as_strided((2, 1000), (stride, 1))
    params[0], params[1] = 1.0, 2.0
    sums, gram = run(backend, params)
    assert sums.tolist() == [[-500.0, 500.0]] and gram[0, 0].tolist() == [250.0, -250.0]


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@on_every_backend
def test_strided_and_misaligned_columns(device, backend, dtype):
    for start, stop in ((0, 96), (1, 65), (7, 136), (16, 17)):
        params = close_experts(4, 200, dtype).to(device)[:, start:stop]
        assert_close(run(backend, params), params)


# -- the C++ kernel's bits ------------------------------------------------------------------------

BITS = """
import hashlib, torch, neulig_fast
digests = [hashlib.blake2b(), hashlib.blake2b()]
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for n in (2, 5, 9, 17):
        generator = torch.Generator().manual_seed(n)
        params = torch.randn(n, 90_007, generator=generator).to(dtype)[:, 3:]
        for threads, digest in enumerate(digests, 1):
            torch.set_num_threads(threads)
            with neulig_fast.use_backend(offset_gram="cpu"):
                for result in neulig_fast.offset_gram(params, [0, 5, 5, 70_000, 90_004]):
                    digest.update(result.numpy().tobytes())
print(*(digest.hexdigest() for digest in digests))
"""


@needs_cpu
@pytest.mark.slow
def test_the_bits_depend_on_neither_instructions_nor_threads(python):
    seen = set()
    for level in ("0", "3", ""):  # the last: the best there is
        done = python(BITS, NEULIG_FAST_CPU=level)
        if "the best level this CPU and build support" in done.stderr:
            continue
        assert done.returncode == 0, done.stderr
        seen.update(done.stdout.split())
    assert len(seen) == 1


@needs_cpu
def test_long_sums_keep_their_digits_beyond_the_reference():
    params = close_experts(3, 600_000).bfloat16()
    assert_close(run("cpu", params), params)


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3),), r"offset_gram: params must be \(N, P\) with N >= 1, got \(3,\)"),
        ((torch.ones(2, 3, dtype=torch.int64),), r"params must be fp32, bf16, fp16 or fp64"),
        ((torch.ones(2, 3), [0, 2]), r"segments must ascend from 0 to P = 3"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        neulig_fast.offset_gram(*args)

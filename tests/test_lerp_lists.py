"""lerp_lists: closed forms, random rounding, in place, and what is refused."""

import pytest
import torch
from torch.autograd import forward_ad

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast._registry import OPS

OP = OPS["lerp_lists"]
DTYPES = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SHAPES = ((), (3, 5), (0, 2), (1,), (2049,), (33, 64))


def lists(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in SHAPES]
        for _ in range(2)
    ]


@DTYPES
@pytest.mark.parametrize("weight", [0.0, 1e-3, 0.49, 0.5, 0.999, 1.0, -0.25, 1.5])
def test_it_obeys_the_rule_against_the_formula_in_fp64(dtype, weight):
    starts, ends = lists(dtype)
    for start, end, got in zip(starts, ends, nf.lerp_lists(starts, ends, weight), strict=True):
        exact = start.double() + weight * (end.double() - start.double())
        testing.assert_within_rule(got, torch.lerp(start, end, weight), exact)


@DTYPES
def test_the_ends_and_what_is_equal_are_exact(dtype):
    starts, ends = lists(dtype)
    assert all(map(torch.equal, nf.lerp_lists(starts, ends, 0.0), starts))
    assert all(map(torch.equal, nf.lerp_lists(starts, ends, 1), ends))
    for weight in (1e-3, 0.3, 0.7):
        same = [start.clone() for start in starts]
        assert all(map(torch.equal, nf.lerp_lists(starts, same, weight), starts))
        assert all(map(torch.equal, nf.lerp_lists(starts, same, weight, 7), starts))


@DTYPES
def test_what_is_not_finite_goes_through(dtype):
    inf, nan = float("inf"), float("nan")
    start = torch.tensor([inf, 1.0, nan, inf, -inf, 0.0], dtype=dtype)
    end = torch.tensor([1.0, inf, 1.0, inf, inf, -0.0], dtype=dtype)
    for weight in (0.25, 0.75):
        (got,) = nf.lerp_lists([start], [end], weight)
        expected = torch.lerp(start, end, weight)
        assert torch.equal(got.isnan(), expected.isnan())
        assert torch.equal(got.nan_to_num(0), expected.nan_to_num(0))


@DTYPES
@pytest.mark.parametrize("seed", [None, 11])
@pytest.mark.parametrize("backend", ["cpu", "torch", "triton"])
def test_in_place_gives_the_same_bits(dtype, seed, backend):
    if OP.why_not(backend, "cpu") is not None:
        pytest.skip(str(OP.why_not(backend, "cpu")))
    if backend == "triton" and (dtype == torch.bfloat16) != (seed is not None):
        pytest.skip("Triton's interpreter is slow, and truncates fp32 to bf16")
    starts, ends = lists(dtype)
    expected = OP.reference(starts, ends, torch.tensor(0.3, dtype=torch.float64), seed, 5)
    versions = [start._version for start in starts]
    with nf.use_backend(lerp_lists=backend):
        assert nf.lerp_lists_(starts, ends, 0.3, seed, 5) is starts
    assert all(map(torch.equal, starts, expected))
    assert all(s._version > v for s, v in zip(starts, versions, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_random_rounding_keeps_the_mean_and_depends_on_place_and_step_alone(dtype):
    n = 1 << 16
    step = 2.0 ** -(7 if dtype == torch.bfloat16 else 10)  # the last place from 1 on
    start, end = torch.ones(n, dtype=dtype), torch.full((n,), 1 + step, dtype=dtype)
    (nearest,) = nf.lerp_lists([start], [end], 0.3)
    assert torch.equal(nearest, start)
    rounded = [nf.lerp_lists([start], [end], 0.3, 3, k)[0] for k in range(3)]
    for one in rounded:
        assert set(one.unique().tolist()) == {1.0, 1 + step}
        share = float((one != 1).double().mean())
        assert abs(share - 0.3) < 5 * (0.21 / n) ** 0.5
    agreeing = float((rounded[0] == rounded[1]).double().mean())  # 0.58 where independent
    assert abs(agreeing - 0.58) < 0.02
    again = nf.lerp_lists([end[:7], start], [end[:7], end], 0.3, 3, 1)[1]
    assert not torch.equal(again, rounded[1])  # another position, another stream
    assert torch.equal(nf.lerp_lists([start[:999]], [end[:999]], 0.3, 3, 1)[0], rounded[1][:999])


def test_threads_and_cuts_do_not_matter():
    starts, ends = ([torch.randn(200_003).bfloat16() for _ in range(3)] for _ in range(2))
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(nf.lerp_lists(starts, ends, 0.01, 5, 2))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *results))
    assert all(
        map(
            torch.equal,
            results[0],
            OP.reference(starts, ends, torch.tensor(0.01, dtype=torch.float64), 5, 2),
        )
    )


def test_everything_that_does_not_fit_is_listed():
    starts = [torch.randn(3), torch.randn(4, 4).T, torch.randn(2)]
    ends = [torch.randn(4), torch.randn(4, 4), torch.randn(2).double()]
    with pytest.raises(ValueError, match="lerp_lists: 6 problems") as info:
        nf.lerp_lists(starts, ends, float("nan"), rounding_seed=2**63, step=-1)
    for text in (
        "ends, position 0: shape (4,), starts has (3,)",
        "starts, position 1: not contiguous",
        "ends, position 2: torch.float64, starts has torch.float32",
        "weight must be a finite number or a tensor of one, got nan",
        "rounding_seed must be a signed 64-bit integer",
        "step must be an integer from 0 to 2**32 - 1, got -1",
    ):
        assert text in str(info.value)
    for wrong in (float("inf"), 10**400):
        with pytest.raises(ValueError, match="weight must be a finite number"):
            nf.lerp_lists([torch.ones(1)], [torch.ones(1)], wrong)
    for wrong in (torch.ones(2), torch.ones((), dtype=torch.int64)):
        with pytest.raises(ValueError, match="weight must be a floating-point number"):
            nf.lerp_lists([torch.ones(1)], [torch.ones(1)], wrong)


def test_in_place_refuses_what_overlaps_or_would_lose_a_gradient():
    whole = torch.randn(100)
    kept = whole.clone()
    cases = [
        ([whole[:60], whole[50:]], [torch.randn(60), torch.randn(50)], "starts, position 0 and"),
        ([whole[:50]], [whole[49:99]], "ends, position 0 overlap"),
        ([whole], [whole], "overlap in memory"),
    ]
    for starts, ends, text in cases:
        with pytest.raises(ValueError, match=text):
            nf.lerp_lists_(starts, ends, 0.5)
    with pytest.raises(ValueError, match="starts, position 0: requires grad and would be"):
        nf.lerp_lists_([whole.requires_grad_()], [torch.randn(100)], 0.5)
    assert torch.equal(whole, kept)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_forward_mode_is_refused_and_not_dropped(place):
    with forward_ad.dual_level():
        given = [torch.ones(3), torch.zeros(3), torch.tensor(0.5)]
        given[place] = forward_ad.make_dual(given[place], torch.ones_like(given[place]))
        for function in (nf.lerp_lists, nf.lerp_lists_):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                function([given[0]], [given[1]], given[2])


def test_no_tensors_and_meta_tensors():
    assert nf.lerp_lists_([], [], 0.5) == []
    assert nf.lerp_lists([], [], 0.5) == []
    meta = torch.empty(3, 2, device="meta")
    (result,) = nf.lerp_lists([meta], [meta], 0.5)
    assert result.shape == (3, 2) and result.is_meta


def test_in_place_is_one_node_of_a_graph():
    starts, ends = lists(torch.float32)
    expected = nf.lerp_lists(starts, ends, 0.3)

    def step(starts, ends):
        nf.lerp_lists_(starts, ends, 0.3)
        return [start + 0 for start in starts]

    results = torch.compile(step, backend="aot_eager", fullgraph=True)(starts, ends)
    assert all(map(torch.equal, results, expected))
    assert all(map(torch.equal, starts, expected))

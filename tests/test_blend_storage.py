"""blend between storage types: fp8, out_dtype, stochastic rounding, scales, and blend_."""

import itertools
import sys

import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS
from neulig_fast.ops import _rounding

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
STORED = (*testing.DTYPES, *FP8)
NARROW = tuple(_rounding.FORMATS)
BACKENDS = testing.backends_of(OPS["blend"])
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_fp8 = pytest.mark.parametrize("dtype", FP8, ids=str)
in_narrow = pytest.mark.parametrize("dtype", NARROW, ids=str)
BOUNDS = [0, 0, 1, 40, 40, 77, 130, 130, 1000]


def run(backend, *args, **options):
    with neulig_fast.use_backend(blend=backend):
        return neulig_fast.blend(*args, **options)


def normal(*shape, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device, dtype)


def wide_range(*shape, device="cpu", seed=0):
    """From far below the narrow types' smallest to beyond their largest, and special values."""
    generator = torch.Generator().manual_seed(seed)
    exponent = torch.randint(-24, 14, shape, generator=generator).float()
    values = torch.randn(shape, generator=generator) * exponent.exp2()
    values[0, 5], values[1, 7], values[-1, 9] = torch.nan, torch.inf, -torch.inf
    return values.to(device)


def bits(tensor):
    """The bits as integers, with one NaN for all."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.where(tensor.isnan(), -1, tensor.view(integers[tensor.itemsize]).long())


def interpreted(device, backend):
    return backend == "triton" and device == "cpu"


def every_value(dtype):
    """All 256 values of an fp8 type."""
    return torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)


# -- every type into every type --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED, ids=str)
@on_every_backend
def test_every_type_in_and_out_has_the_references_bits(device, backend, dtype):
    params = wide_range(5, 1000, device=device).to(dtype)
    weights = normal(3, len(BOUNDS) - 1, 5, device=device, seed=1)
    for out, seed in itertools.product(STORED, (None, -3)):
        if seed is not None and out not in NARROW:
            continue
        if seed is None and out == torch.bfloat16 and interpreted(device, backend):
            continue  # which truncates
        got = run(backend, weights, params, BOUNDS, out, seed)
        assert got.dtype == out
        expected = run("torch", weights, params, BOUNDS, out, seed)
        assert torch.equal(bits(got), bits(expected)), (out, seed)


@in_fp8
@on_every_backend
def test_every_fp8_value_is_read_and_written_exactly(device, backend, dtype):
    values = every_value(dtype).to(device)
    one = torch.ones(1, device=device)
    wide = run(backend, one, values[None], out_dtype=torch.float32)
    assert torch.equal(wide.nan_to_num(0.5), values.float().nan_to_num(0.5))
    back = run(backend, one, wide[None], out_dtype=dtype)
    finite = values.float().isfinite()
    assert torch.equal(back.view(torch.uint8)[finite], values.view(torch.uint8)[finite])


@in_fp8
@on_every_backend
def test_fp8_saturates_and_keeps_nan(device, backend, dtype):
    largest = torch.finfo(dtype).max
    row = [largest, 1.0625 * largest, 2 * largest, 1e30, torch.inf, -1e30, -torch.inf, torch.nan]
    params, one = torch.tensor([row], device=device), torch.ones(1, device=device)
    for seed in (None, 5):
        got = run(backend, one, params, None, dtype, seed).float()
        expected = torch.tensor([largest] * 5 + [-largest] * 2, device=device)
        assert torch.equal(got[:7], expected) and got[7].isnan()


@on_every_backend
def test_fp64_goes_to_narrow_types_by_way_of_fp32(device, backend):
    # One ulp of fp64 above halfway between two bf16: fp32 cannot tell, so it is a tie, to even.
    value = 1 + 2.0**-8 + 2.0**-40
    params = torch.full((1, 20), value, device=device, dtype=torch.float64)
    got = run(backend, torch.ones(1, device=device), params, out_dtype=torch.bfloat16)
    assert got.eq(1).all()


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, *FP8], ids=str)
def test_outputs_too_large_for_the_caches_have_the_same_bits(out):
    if OPS["blend"].why_not("cpu", "cpu") is not None:
        pytest.skip("the C++ extension is not built")
    width = (32 << 20) // out.itemsize // 2 + 77  # two outputs pass the threshold of streaming
    params = normal(2, width + 3, dtype=torch.float16)[:, 3:]
    weights, bounds = normal(2, 3, 2, seed=1), [0, 5, width - 9, width]
    got, expected = (run(b, weights, params, bounds, out) for b in ("cpu", "torch"))
    assert torch.equal(bits(got), bits(expected))


# -- stochastic rounding ---------------------------------------------------------------------------

# Random123's kat_vectors for philox4x32-10: counter, key, words.
PHILOX = [
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0x299F31D0A4093822,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, words", PHILOX)
def test_philox_gives_the_published_words(counter, key, words):
    got = _rounding.philox(key, *(torch.tensor([c]) for c in counter))
    assert [int(word) for word in got] == words


@in_narrow
@on_every_backend
def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean(device, backend, dtype):
    # Interpreted kernels, slow, have the reference's bits (above): their mean is of fewer.
    draws = 2000 if interpreted(device, backend) else 20_000
    tiny = torch.finfo(dtype).smallest_normal
    exact = torch.tensor([1.1, -2.7, 0.3 * tiny, 0.01 * tiny, 1.7 * tiny], device=device)
    params = exact.repeat_interleave(draws)[None]
    params = params.clamp(min=-torch.finfo(dtype).max)
    got = run(backend, torch.ones(1, device=device), params, None, dtype, 11).double().view(5, -1)
    for value, rounded in zip(exact.double(), got, strict=True):
        found = rounded.unique()
        assert len(found) == 2 and found[0] < value < found[1]
        gap = found[1] - found[0]
        share = ((rounded - found[0]) / gap).mean()
        expected = (value - found[0]) / gap
        error = (expected * (1 - expected) / draws) ** 0.5
        assert abs(share - expected) < 5 * error  # of the mean, in standard deviations


@in_narrow
@on_every_backend
def test_what_is_representable_stays(device, backend, dtype):
    values = wide_range(2, 3000, device=device)[:1].nan_to_num().clamp(-400, 400).to(dtype)
    got = run(backend, torch.ones(1, device=device), values, rounding_seed=3)
    assert torch.equal(bits(got), bits(values[0]))


@in_narrow
@on_every_backend
def test_overflow_and_special_values_are_those_of_nearest(device, backend, dtype):
    row = torch.tensor([[torch.nan, torch.inf, -torch.inf, 3.0e38, -3.0e38]], device=device)
    two = torch.full((1,), 2.0, device=device)
    got, nearest = (run(backend, two, row, None, dtype, seed) for seed in (3, None))
    assert torch.equal(bits(got), bits(nearest))


@on_every_backend
def test_a_tensor_gets_the_same_bits_in_an_arena_and_alone(device, backend):
    params = normal(3, 500, device=device)
    weights = normal(2, 4, 3, device=device, seed=1)
    whole = run(backend, weights, params, [0, 32, 97, 97, 500], torch.bfloat16, 2**63 - 1)
    alone = run(backend, weights[:, 0], params[:, :32], None, torch.bfloat16, 2**63 - 1)
    assert torch.equal(whole[:, :32], alone)
    other = run(backend, weights, params, [0, 32, 97, 97, 500], torch.bfloat16, -1)
    assert not torch.equal(whole, other)


def test_words_beyond_2_to_the_32_columns_and_of_every_row_differ():
    like = torch.empty(2, 8)
    words = _rounding.words(1, like, 0)
    assert len(words.unique()) == 16
    assert not torch.equal(words, _rounding.words(1, like, 1))
    assert not torch.equal(words, _rounding.words(2**32 + 1, like, 0))


# -- scales ----------------------------------------------------------------------------------------


@in_fp8
def test_scales_fold_into_the_weights(dtype):
    full, scales = normal(3, 64, dtype=torch.float64), torch.tensor([0.5, 2.0, 0.25])
    stored = (full / scales[:, None]).to(dtype)
    weights = normal(2, 3, seed=1)
    got = neulig_fast.blend(
        weights, stored, None, torch.float32, scales=scales, out_scales=torch.tensor([2.0, 4.0])
    )
    expected = weights @ (stored.float() * scales[:, None]) / torch.tensor([[2.0], [4.0]])
    torch.testing.assert_close(got, expected)


def test_scales_per_segment_and_their_gradients():
    params, bounds = normal(2, 30, dtype=torch.float64), [0, 10, 30]
    weights = normal(3, 2, 2, dtype=torch.float64, seed=1).requires_grad_()
    scales = torch.rand(2, 2, dtype=torch.float64).add(1).requires_grad_()
    outer = torch.rand(3, 2, dtype=torch.float64).add(1).requires_grad_()

    def blend(weights, scales, out_scales):
        return neulig_fast.blend(weights, params, bounds, scales=scales, out_scales=out_scales)

    assert torch.autograd.gradcheck(blend, (weights, scales, outer))
    for s, (start, stop) in enumerate([(0, 10), (10, 30)]):
        theta = weights[:, s] @ (params[:, start:stop] * scales[s, :, None]) / outer[:, s, None]
        torch.testing.assert_close(blend(weights, scales, outer)[:, start:stop], theta)
        one = blend(weights, scales, outer[0])[:, start:stop] * outer[0, s]
        torch.testing.assert_close(one, blend(weights, scales, None)[:, start:stop])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scales": torch.ones(3)}, r"scales must be \(N,\), with segments also.*got \(3,\)"),
        ({"scales": torch.ones(2, dtype=torch.int64)}, "scales must be floating point on cpu"),
        ({"out_scales": torch.ones(2)}, r"out_scales must be \(\) or \(K,\).*got \(2,\)"),
        ({"scales": torch.ones(2, device="meta")}, "scales must be .* got torch.float32 on meta"),
    ],
)
def test_wrong_scales_are_named(options, message):
    with pytest.raises(ValueError, match=f"blend: {message}"):
        neulig_fast.blend(torch.ones(2), torch.ones(2, 4), **options)


# -- gradients -------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", STORED, ids=str)
@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_gradients_of_the_weights_in_every_pair_of_types(dtype, out, monkeypatch):
    # Several pieces; the package's attribute `blend` is the function, not the module.
    monkeypatch.setattr(sys.modules["neulig_fast.ops.blend"], "_CONVERTED", 30)
    params, weights = normal(3, 64).to(dtype), normal(2, 4, 3, seed=1).requires_grad_()
    merged = neulig_fast.blend(weights, params, [0, 7, 7, 40, 64], out)
    seed = torch.randint(-3, 4, (2, 64)).to(out)  # exact in every type
    (got,) = torch.autograd.grad(merged, weights, seed)
    for s, (a, b) in enumerate([(0, 7), (7, 7), (7, 40), (40, 64)]):
        expected = seed[:, a:b].double() @ params[:, a:b].double().T
        torch.testing.assert_close(got[:, s].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_the_parameters_have_their_type(out):
    params = normal(3, 40).to(torch.bfloat16).requires_grad_()
    merged = neulig_fast.blend(torch.tensor([0.5, 2.0, -1.0]), params, out_dtype=out)
    (got,) = torch.autograd.grad(merged.float().sum(), params)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got.float(), torch.tensor([[0.5], [2.0], [-1.0]]).expand(3, 40))


def test_fp8_parameters_have_no_gradient_and_say_so():
    params = normal(2, 8).to(torch.float8_e5m2).requires_grad_()
    merged = neulig_fast.blend(torch.ones(2), params, out_dtype=torch.float32)
    with pytest.raises(RuntimeError, match="blend: not differentiable in fp8 params"):
        merged.sum().backward()


def test_stochastic_rounding_has_the_gradient_of_none():
    params, weights = normal(3, 50), normal(3, seed=1).requires_grad_()
    merged = neulig_fast.blend(weights, params, None, torch.bfloat16, 4)
    merged.float().sum().backward()
    torch.testing.assert_close(weights.grad, params.sum(1))


def test_types_and_seeds_compile_without_a_graph_for_each_seed():
    def f(weights, params, seed):
        return neulig_fast.blend(weights, params, None, torch.bfloat16, seed).float()

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    weights, params = normal(3), normal(3, 65, seed=1)
    for seed in range(3, 9):
        assert torch.equal(compiled(weights, params, seed), f(weights, params, seed))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


# -- blend_ ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", STORED, ids=str)
@on_every_backend
def test_blend_writes_rows_of_a_bigger_tensor_and_nothing_else(device, backend, dtype):
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates fp32 to bf16")
    buffer = torch.full((5, 300), 7.0, device=device).to(dtype)
    params, weights = normal(3, 261, device=device), normal(2, 3, device=device, seed=1)
    with neulig_fast.use_backend(blend=backend):
        out = buffer[1:4:2, 3:264]
        assert neulig_fast.blend_(out, weights, params) is out
    assert torch.equal(bits(out), bits(run(backend, weights, params, out_dtype=dtype)))
    out.fill_(7.0)
    assert buffer.float().eq(7).all()


def test_blend_into_a_tensor_changes_its_version_and_nothing_is_allocated():
    params, out = normal(2, 20), torch.empty(20)
    saved = (normal(20, seed=1).requires_grad_() * out.detach()).sum()
    before = out._version
    neulig_fast.blend_(out, torch.ones(2), params)
    assert out._version == before + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_blend_into_takes_scales_and_seeds():
    params, weights, out = normal(2, 20), normal(2, seed=1), torch.empty(20, dtype=torch.bfloat16)
    options = {"scales": torch.tensor([2.0, 3.0]), "out_scales": torch.tensor(4.0)}
    neulig_fast.blend_(out, weights, params, None, 5, **options)
    expected = neulig_fast.blend(weights, params, None, torch.bfloat16, 5, **options)
    assert torch.equal(out, expected)


def test_memory_that_is_read_is_not_written():
    base = torch.arange(60.0)
    params, before = base.as_strided((2, 20), (30, 1)), base.clone()
    with pytest.raises(ValueError, match="blend_: out shares memory with params"):
        neulig_fast.blend_(base[19:39], torch.ones(2), params)
    with pytest.raises(ValueError, match="blend_: out shares memory with weights"):
        neulig_fast.blend_(base[:20], base[18:20], torch.ones(2, 20))
    assert torch.equal(base, before)
    # Between two rows of params: addresses interleave, and nothing is shared.
    neulig_fast.blend_(base[20:30], torch.ones(2), base.as_strided((2, 10), (30, 1)))
    assert torch.equal(base[20:30], before[:10] + before[30:40])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_memory_that_is_read_is_not_written_by_compiled_code(backend):
    def from_one(buffer, weights, first=0):
        return neulig_fast.blend_(buffer[0], weights, buffer[first:])

    weights, params = torch.tensor([0.25, 0.75]), normal(2, 20)
    before = params.clone()
    torch._dynamo.reset()
    with pytest.raises(Exception, match="out shares memory with params"):
        torch.compile(from_one, backend=backend, fullgraph=True)(params, weights)
    with pytest.raises(Exception, match="out shares memory with params"):
        compiled = torch.compile(neulig_fast.blend_, backend=backend, fullgraph=True)
        compiled(params[1], weights, params)
    assert torch.equal(params, before)
    rows = torch.zeros(3, 20)
    rows[1:] = params
    # Of one storage, and nothing is shared.
    torch.compile(from_one, backend=backend, fullgraph=True)(rows, weights, 1)
    assert torch.equal(rows[0], neulig_fast.blend(weights, params))


def test_blend_into_a_tensor_changes_its_version_in_inference_mode_too():
    params, out = normal(2, 20), torch.empty(20)
    saved = (normal(20, seed=1).requires_grad_() * out).sum()
    with torch.inference_mode():
        neulig_fast.blend_(out, torch.ones(2), params)
        neulig_fast.blend_(torch.empty(20), torch.ones(2), params)  # has no version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_a_negated_view_is_not_written():
    out = torch.zeros(20)
    with pytest.raises(ValueError, match="blend_: out is a negated view"):
        neulig_fast.blend_(torch._neg_view(out), torch.ones(2), normal(2, 20))
    assert out.eq(0).all()


def test_tensors_that_require_grad_are_not_overwritten():
    weights, params = torch.ones(2), torch.ones(2, 6)
    leaf = torch.zeros(6, requires_grad=True)
    with torch.no_grad():
        view = leaf[:]
    for out in (leaf, leaf[:], view, leaf * 1):
        with pytest.raises(RuntimeError, match="blend_: not differentiable, but out requires grad"):
            neulig_fast.blend_(out, weights, params)
    with pytest.raises(RuntimeError, match="but weights requires grad"):
        neulig_fast.blend_(torch.zeros(6), weights.clone().requires_grad_(), params)
    with pytest.raises(RuntimeError, match="but out_scales requires grad"):
        neulig_fast.blend_(
            torch.zeros(6), weights, params, out_scales=torch.ones((), requires_grad=True)
        )
    assert leaf.eq(0).all()
    with torch.no_grad():
        neulig_fast.blend_(leaf, weights, params)
    assert leaf.eq(2).all()


WRONG = [
    (torch.zeros(5), None, r"out must be \(4,\), got \(5,\)"),
    (torch.zeros(1, 4), None, r"out must be \(4,\), got \(1, 4\)"),
    (torch.zeros(4, dtype=torch.int32), None, "the output must be fp32, bf16,.* got torch.int32"),
    (torch.zeros(8)[::2], None, "out must have contiguous columns, got stride 2"),
    (torch.zeros(4).to_sparse(), None, "out must be dense"),
    (torch.zeros(4, device="meta"), None, "out must be on cpu like params, got meta"),
    (torch.zeros(4), 1, r"rounding_seed: nothing to round in torch.float32"),
]


@pytest.mark.parametrize("out, seed, message", WRONG, ids=[message for *_, message in WRONG])
def test_wrong_outputs_are_named(out, seed, message):
    with pytest.raises(ValueError, match=f"blend_: {message}"):
        neulig_fast.blend_(out, torch.ones(2), torch.ones(2, 4), None, seed)


def test_the_output_is_named_beside_the_weights():
    with pytest.raises(ValueError, match="2 problems") as caught:
        neulig_fast.blend_(torch.zeros(9), torch.zeros(3), torch.ones(2, 8))
    assert "here N = 2; got (3,)" in str(caught.value)
    assert "out must be (8,), got (9,)" in str(caught.value)


@pytest.mark.parametrize("name", ["out", "weights", "params", "scales", "out_scales"])
def test_arguments_of_another_type_are_named(name):
    given = {"out": torch.zeros(4), "weights": torch.ones(2), "params": torch.ones(2, 4)}
    with pytest.raises(TypeError, match=f"blend_: {name} must be a tensor, got list"):
        neulig_fast.blend_(**{**given, name: [1.0]})


def test_rows_of_the_output_that_overlap_are_named():
    out = torch.zeros(4).expand(3, 4)
    with pytest.raises(ValueError, match="blend_: the rows of out overlap: 4 columns, 0 apart"):
        neulig_fast.blend_(out, torch.ones(3, 2), torch.ones(2, 4))


@pytest.mark.parametrize("out", [torch.int8, torch.complex64, torch.float8_e4m3fnuz], ids=str)
def test_output_types_that_do_not_exist_are_named(out):
    with pytest.raises(ValueError, match=f"blend: the output must be fp32, bf16.*got {out}"):
        neulig_fast.blend(torch.ones(2), torch.ones(2, 4), out_dtype=out)


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_seeds_have_64_bits(seed):
    with pytest.raises(ValueError, match="rounding_seed must be a signed 64-bit integer"):
        neulig_fast.blend(torch.ones(2), torch.ones(2, 4), None, torch.bfloat16, seed)


def test_both_names_follow_the_choice_of_a_backend():
    with neulig_fast.use_backend(blend="torch"):
        assert OPS["blend_"].forced() == "torch"
        with neulig_fast.use_backend(blend_="cpu"):
            assert (OPS["blend_"].forced(), OPS["blend"].forced()) == ("cpu", "torch")

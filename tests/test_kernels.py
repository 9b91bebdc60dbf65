"""The Triton launchers, called directly: exact bits, odd shapes, nothing written beside the target.

On a machine without a GPU the kernels run in Triton's interpreter, on CPU tensors.
"""

import pytest
import torch

from neulig_fast import testing
from neulig_fast.kernels import _launch
from neulig_fast.kernels import blend as blend_module
from neulig_fast.kernels import blend_weight_grad as grad_module
from neulig_fast.kernels._launch import Config, config
from neulig_fast.ops.blend import blend_fake, blend_reference
from neulig_fast.ops.blend_weight_grad import blend_weight_grad_reference

DEVICE = "cpu" if _launch.INTERPRETED else "cuda"
RUNS = _launch.INTERPRETED or (_launch.MISSING is None and torch.cuda.is_available())
needs_triton = pytest.mark.skipif(not RUNS, reason=_launch.MISSING or "no GPU, not interpreted")
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
SEGMENTS = [0, 0, 1, 40, 40, 40, 64, 130, 130]  # for 130 columns: empty, single, cut anywhere


def normal(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def integers(*shape, dtype=torch.float32, seed=0):
    """Small whole numbers: their products and sums are exact in fp32, in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-4, 5, shape, generator=generator).to(DEVICE, dtype)


def accumulator(dtype):
    return torch.promote_types(dtype, torch.float32)


def bounds_of(*values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


def blend(weights, params, segments=None, launch=None):
    """What the launcher writes into a new tensor."""
    out = blend_fake(weights, params, segments)
    assert blend_module.blend(out, weights, params, segments, None, launch) is None
    return out


def expected_blend(weights, params, segments=None):
    """The reference's bits. The interpreter truncates fp32 to bf16 where a GPU rounds."""
    if params.dtype != torch.bfloat16 or not _launch.INTERPRETED:
        return blend_reference(weights, params, segments)
    full = blend_reference(weights, params.float(), segments)
    return (full.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


# -- blend ---------------------------------------------------------------------------------------


@needs_triton
@in_every_dtype
@pytest.mark.parametrize(
    "n, k, p", [(1, 1, 1), (2, 1, 17), (5, 1, 1025), (5, 3, 1040), (8, 2, 130), (64, 2, 70)]
)
def test_blend_gives_the_references_bits(dtype, n, k, p):
    weights, params = normal(k, n, dtype=accumulator(dtype)), normal(n, p, dtype=dtype, seed=1)
    assert torch.equal(blend(weights, params), expected_blend(weights, params))
    assert torch.equal(blend(weights[0], params), expected_blend(weights[0], params))


@needs_triton
@pytest.mark.parametrize("n", [3, 4, 6, 7, 9, 16, 17, 24, 25, 33, 64])
def test_blend_streams_any_number_of_experts(n):
    weights, params = normal(n), normal(n, 130, seed=1)
    assert torch.equal(blend(weights, params), expected_blend(weights, params))


@needs_triton
@in_every_dtype
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("n", [2, 11])
@pytest.mark.parametrize("block", [16, 256])
def test_blend_with_segments_in_blocks_and_blocks_in_segments(dtype, k, n, block):
    segments, params = bounds_of(*SEGMENTS), normal(n, 130, dtype=dtype, seed=1)
    weights = normal(k, len(SEGMENTS) - 1, n, dtype=accumulator(dtype))
    launch = Config(block, 1, config("blend", dtype, n, k).held)
    got = blend(weights, params, segments, launch)
    assert torch.equal(got, expected_blend(weights, params, segments))


@needs_triton
def test_blend_with_hundreds_of_segments():
    cuts = torch.randint(0, 1500, (301,), generator=torch.Generator().manual_seed(2)).sort().values
    segments = torch.cat([torch.tensor([0]), cuts, torch.tensor([1500])]).to(DEVICE)
    weights, params = normal(302, 2), normal(2, 1500, seed=1)
    got = blend(weights, params, segments)
    assert torch.equal(got, expected_blend(weights, params, segments))


@needs_triton
@pytest.mark.parametrize("k", [1, 8])
def test_k_outputs_are_k_calls_bit_for_bit(k):
    weights, params = normal(k, 6), normal(6, 1030, seed=1)
    together = blend(weights, params)
    for row, w in zip(together, weights, strict=True):
        assert torch.equal(row, blend(w, params))


@needs_triton
@in_every_dtype
@pytest.mark.parametrize("start, width", [(0, 96), (1, 64), (7, 129), (16, 17)])
def test_blend_reads_strided_and_misaligned_rows(dtype, start, width):
    params = normal(4, 200, dtype=dtype)[:, start : start + width]
    weights = normal(2, 4, dtype=accumulator(dtype), seed=1)
    assert torch.equal(blend(weights, params), expected_blend(weights, params))


@needs_triton
def test_nan_and_infinity_pass_through():
    params = normal(3, 40)
    params[0, 3], params[1, 5], params[2, 7] = float("nan"), float("inf"), float("-inf")
    weights = torch.tensor([0.0, 0.0, 2.0], device=DEVICE)
    got, expected = blend(weights, params), blend_reference(weights, params)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert got[[3, 5]].isnan().all() and got[7] == float("-inf")


@needs_triton
def test_offsets_beyond_2_to_the_31():
    stride = 2**31 + 48  # elements between two rows: 4.3 GB of addresses, two pages of memory
    params = torch.empty(stride + 64, dtype=torch.bfloat16, device=DEVICE).as_strided(
        (2, 64), (stride, 1)
    )
    params.copy_(normal(2, 64, dtype=torch.bfloat16))
    weights = torch.tensor([0.0, 1.0], device=DEVICE)
    assert torch.equal(blend(weights, params), params[1])
    ones = torch.ones(64, dtype=torch.bfloat16, device=DEVICE)
    got = grad_module.blend_weight_grad(ones, params)
    assert torch.allclose(got, params.float().sum(1), rtol=1e-5)


# -- memory --------------------------------------------------------------------------------------

CANARY = 12345.0


def fenced(values):
    """A copy of ``values`` in the middle of a bigger buffer of canaries, and that buffer."""
    buffer = torch.full((values.numel() + 256,), CANARY, device=DEVICE).to(values.dtype)
    inner = buffer[128 : 128 + values.numel()].view(values.shape)
    inner.copy_(values)
    return inner, buffer


def assert_intact(buffer, inner):
    canary = torch.tensor(CANARY).to(buffer.dtype).to(DEVICE)
    outside = torch.cat([buffer[:128], buffer[128 + inner.numel() :]])
    assert (outside == canary).all()


@needs_triton
@in_every_dtype
@pytest.mark.parametrize("p", [1, 17, 130])
def test_blend_writes_its_output_and_nothing_else(dtype, p):
    params, weights = normal(3, p, dtype=dtype), normal(2, 1, 3, dtype=accumulator(dtype), seed=1)
    out, buffer = fenced(torch.zeros(2, p, dtype=dtype))
    launch = Config(64, 1, 3)
    _launch.run(params, blend_module.launches(out, weights, params, None, None, launch))
    assert torch.equal(out, expected_blend(weights[:, 0], params))
    assert_intact(buffer, out)


@needs_triton
@pytest.mark.parametrize(
    "bounds", [[0, 0, 0, 0], [-7, 999, -3, 5], [130, 64, 9, 0], [5, 5, 5, 5], [-999, -999, -999, 5]]
)
def test_wrong_bounds_harm_nothing(bounds):
    """Bounds on a GPU are never checked: whatever they hold, all accesses stay inside."""
    params, (weights, _) = torch.ones(2, 130, device=DEVICE), fenced(torch.ones(3, 2))
    out, buffer = fenced(torch.zeros(1, 130))
    segments, _ = fenced(bounds_of(*bounds))
    launch = Config(32, 1, 2)
    _launch.run(params, blend_module.launches(out, weights, params, segments, None, launch))
    assert_intact(buffer, out)
    assert (out == 2).all(), "weights of no segment"
    (grad, _), launch = fenced(torch.ones(1, 130)), Config(32, 1, 1, 16, 2)
    partials, partial_buffer = fenced(torch.zeros(2, 7))
    result, result_buffer = fenced(torch.zeros(3, 2))
    arguments = (grad, params, segments, partials, result, launch)
    _launch.run(params, grad_module.launches(*arguments))
    assert_intact(partial_buffer, partials)
    assert (partials <= 32).all(), "columns that do not exist"
    assert_intact(result_buffer, result)


# -- blend_weight_grad ---------------------------------------------------------------------------


@needs_triton
@in_every_dtype
@pytest.mark.parametrize("n, k, p", [(1, 1, 1), (3, 1, 1025), (5, 2, 130), (9, 5, 17)])
def test_weight_grad_is_exact_where_sums_are(dtype, n, k, p):
    grad, params = integers(k, p, dtype=dtype), integers(n, p, dtype=dtype, seed=1)
    expected = blend_weight_grad_reference(grad, params)
    got = grad_module.blend_weight_grad(grad, params)
    assert got.dtype == accumulator(dtype) and torch.equal(got, expected)
    assert torch.equal(grad_module.blend_weight_grad(grad[0], params), expected[0])


@needs_triton
@in_every_dtype
@pytest.mark.parametrize("block", [16, 64, 256])
def test_weight_grad_per_segment_is_exact_where_sums_are(dtype, block):
    segments, (k, s, n) = bounds_of(*SEGMENTS), (2, len(SEGMENTS) - 1, 3)
    grad = integers(k, 130, dtype=dtype)
    params = integers(n, 200, dtype=dtype, seed=1)[:, 7:137]
    slots = -(-130 // block) + s - 1
    partials = torch.full((k * n, slots), float("nan"), dtype=accumulator(dtype), device=DEVICE)
    out = torch.empty(k, s, n, dtype=accumulator(dtype), device=DEVICE)
    launch = Config(block, 1, 2, 16, 2)
    _launch.run(params, grad_module.launches(grad, params, segments, partials, out, launch))
    assert torch.equal(out, blend_weight_grad_reference(grad, params, segments))
    assert torch.equal(out, grad_module.blend_weight_grad(grad, params, segments, launch))


@needs_triton
@in_every_dtype
def test_weight_grad_obeys_the_tolerance_rule(dtype):
    grad, params = normal(5000, dtype=dtype), normal(2, 5000, dtype=dtype, seed=1)
    working = blend_weight_grad_reference(grad, params)
    oracle = blend_weight_grad_reference(grad.double(), params.double())
    got = grad_module.blend_weight_grad(grad, params)
    testing.assert_within_rule(got, working, oracle, terms=5000)
    assert torch.equal(got, grad_module.blend_weight_grad(grad, params))


@needs_triton
def test_weight_grad_sums_no_neighbours():
    """A NaN in one segment is that segment's alone, also within a block."""
    grad, params = torch.ones(100, device=DEVICE), torch.ones(1, 100, device=DEVICE)
    params[0, 50] = float("nan")
    got = grad_module.blend_weight_grad(grad, params, bounds_of(0, 50, 51, 100))
    assert got[1].isnan().all() and got[0] == 50 and got[2] == 49


# -- doors ---------------------------------------------------------------------------------------


@needs_triton
def test_empty_calls_launch_nothing():
    assert blend(normal(3), normal(3, 0)).shape == (0,)
    assert blend(normal(0, 3), normal(3, 5)).shape == (0, 5)
    assert blend(normal(2, 0, 3), normal(3, 0), bounds_of(0)).shape == (2, 0)
    assert torch.equal(
        grad_module.blend_weight_grad(normal(2, 0), normal(3, 0)), torch.zeros(2, 3, device=DEVICE)
    )
    assert grad_module.blend_weight_grad(normal(0), normal(3, 0), bounds_of(0)).shape == (0, 3)


@needs_triton
@pytest.mark.parametrize(
    "params, segments, reason",
    [
        (torch.ones(65, 4), None, "65 experts, more than 64"),
        (torch.ones(4, 6).T, None, "columns are not contiguous"),
        (torch.ones(2, 4, dtype=torch.int32), None, "not fp32, bf16, fp16 or fp64"),
        (torch.ones(2, 4), torch.zeros(1, dtype=torch.int64), "no segment for 4 columns"),
    ],
)
def test_what_triton_cannot_do_it_says(params, segments, reason):
    params = params.to(DEVICE)
    for module, first in ((blend_module, normal(3)), (grad_module, normal(4))):
        assert reason in module.why_not(first, params, segments)
    with pytest.raises(ValueError, match=f"blend: .*{reason}"):
        blend(normal(3), params, segments)

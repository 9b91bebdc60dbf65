"""mixture_layer_norm beyond test_house.py: merged models, experts, masks, samples apart, errors."""

import pytest
import torch
from torch.nn import functional as F

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS

OP = OPS["mixture_layer_norm"]
DEVICES = testing.devices()
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)


def run(backend, *args, **options):
    with neulig_fast.use_backend(mixture_layer_norm=backend):
        return neulig_fast.mixture_layer_norm(*args, **options)


def assert_close(backend, *args):
    """The tolerance rule for one call of the op."""
    with neulig_fast.use_backend(mixture_layer_norm=backend):
        testing.assert_op_close(OP, OP(*args), args)


def layer(B, T, N, D, device="cpu", dtype=torch.float64):
    """x, weight, bias and coefficients that do not sum to one."""
    shapes = (B, T, D), (N, D), (N, D), (B, N)
    return tuple(torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes)


def merged(x, weight, bias, coef, eps=1e-5):
    """The layer norm of every sample's merged model."""
    pairs = zip(x, coef @ weight, coef @ bias, strict=True)
    return torch.stack(
        [F.layer_norm(a, a.shape[-1:], gain, shift, eps) for a, gain, shift in pairs]
    )


@on_every_backend
def test_equals_the_layer_of_every_merged_model(device, backend):
    args = layer(4, 6, 3, 20, device)
    expected = merged(*args, eps=1e-6)
    got = run(backend, *args, 1e-6)
    testing.assert_within_rule(got, expected, expected, terms=20 * 3)


@in_every_dtype
@on_every_backend
def test_one_hot_rows_give_the_layer_of_that_expert(device, backend, dtype):
    x, weight, bias, _ = layer(3, 5, 3, 18, device, dtype)
    coef = torch.eye(3, device=device)[[2, 0, 1]]
    expert = neulig_fast.expert_layer_norm
    args = x, weight[[2, 0, 1]], bias[[2, 0, 1]]
    working, oracle = expert(*args), expert(*testing.cast(args, torch.float64))
    testing.assert_within_rule(run(backend, x, weight, bias, coef), working, oracle, terms=18)


@on_every_backend
def test_identical_experts_are_their_merged_model(device, backend):
    x, weight, bias, coef = layer(4, 3, 5, 11, device)
    got = run(backend, x, weight[:1].expand(5, -1), bias[:1].expand(5, -1), coef.softmax(1))
    expected = F.layer_norm(x, (11,), weight[0], bias[0])
    testing.assert_within_rule(got, expected, expected, terms=5 * 11)


@on_every_backend
def test_the_order_of_the_experts_does_not_matter(device, backend):
    x, weight, bias, coef = layer(2, 5, 6, 9, device)
    order = [3, 0, 5, 1, 4, 2]
    expected = run(backend, x, weight, bias, coef)
    got = run(backend, x, weight[order], bias[order], coef[:, order])
    testing.assert_within_rule(got, expected, expected, terms=6 * 9)


@on_every_backend
def test_one_vector_for_the_batch_is_that_vector_for_each(device, backend):
    x, weight, bias, coef = layer(4, 6, 3, 10, device)
    expected = run(backend, x, weight, bias, coef[:1].expand(4, -1))
    assert torch.equal(run(backend, x, weight, bias, coef[0]), expected)
    image = x.view(4, 2, 3, 10)  # any dimensions between
    assert torch.equal(run(backend, image, weight, bias, coef[0]), expected.view(4, 2, 3, 10))


@in_every_dtype
@on_every_backend
def test_an_expert_with_coefficient_zero_takes_no_part(device, backend, dtype):
    x, weight, bias, coef = layer(3, 4, 3, 17, device, dtype)
    coef[[0, 2], 1] = 0.0
    expected = run(backend, x, weight, bias, coef)
    weight[1], bias[1] = torch.nan, torch.inf
    got = run(backend, x, weight, bias, coef)
    assert torch.equal(got[[0, 2]], expected[[0, 2]]) and got[1].isnan().all()
    coef[0, 2] = torch.nan  # a coefficient that is none is no zero
    assert run(backend, x, weight, bias, coef)[0].isnan().all()


@in_every_dtype
@on_every_backend
def test_a_sample_knows_nothing_of_the_others(device, backend, dtype):
    x, weight, bias, coef = layer(5, 7, 3, 33, device, dtype)
    expected = run(backend, x, weight, bias, coef)[2]
    x[[0, 1]], coef[3], coef[4, 0] = torch.nan, torch.inf, 0.0
    assert torch.equal(run(backend, x, weight, bias, coef)[2], expected)


@on_every_backend
def test_a_residual_is_added_first_and_handed_on(device, backend):
    x, weight, bias, coef = layer(2, 6, 3, 33, device, torch.float32)
    beside = torch.randn(2, 6, 33).to(device)
    y, s = run(backend, x, weight, bias, coef, residual=beside)
    assert torch.equal(s, x + beside)
    assert torch.equal(y, run(backend, s, weight, bias, coef))


@on_every_backend
def test_a_large_mean_does_not_cancel(device, backend):
    x, *others = layer(2, 5, 3, 300, device, torch.float32)
    assert_close(backend, x + 1e4, *others, 1e-5, None)


@in_every_dtype
@pytest.mark.parametrize(
    "B, T, N, D", [(1, 1, 1, 1), (3, 5, 2, 7), (2, 70, 3, 3), (1, 3, 40, 1000)]
)
@on_every_backend
def test_sizes_that_divide_nothing(device, backend, B, T, N, D, dtype):
    x, *others = layer(B, T, N, D, device, dtype)
    assert_close(backend, x, *others, 1e-5, x.flip(1))


@in_every_dtype
@on_every_backend
def test_strided_rows_arenas_and_coefficients(device, backend, dtype):
    arena = torch.randn(3, 100).to(device, dtype)
    x = torch.randn(8, 4, 40).to(device, dtype)[::2, :, 5:22].transpose(0, 1)
    coef = torch.randn(3, 4).to(device).T
    with neulig_fast.use_backend(mixture_layer_norm=backend):
        args = x, arena[:, 3:20], arena[:, 51:68], coef.to(dtype), 1e-5, x.flip(1)
        testing.assert_op_close(OP, OP(*args), args)
        assert all(result.is_contiguous() for result in OP(*args))
        for w in (coef.double(), coef.bfloat16()):  # coefficients of any type
            same = (*args[:3], w, *args[4:])
            testing.assert_op_close(OP, OP(*same), same)


@on_every_backend
def test_experts_further_apart_than_two_to_the_31_values(device, backend):
    stride = 2**31 + 48  # 4.3 GB of addresses, two pages of memory
    weight = torch.empty(stride + 64, dtype=torch.bfloat16, device=device).as_strided(
        (2, 9), (stride, 1)
    )
    weight.copy_(torch.randn(2, 9))
    x, _, _, coef = layer(2, 3, 2, 9, device, torch.bfloat16)
    assert_close(backend, x, weight, weight, coef, 1e-5, None)


@on_every_backend
def test_empty_inputs(device, backend):
    for B, T in ((0, 3), (3, 0)):
        x, weight, bias, coef = layer(B, T, 2, 5, device)
        y, s = run(backend, x, weight, bias, coef, residual=x)
        assert y.shape == s.shape == (B, T, 5)
        assert run(backend, x, weight, None, torch.ones(2, device=device)).shape == (B, T, 5)


@on_every_backend
def test_gradients_of_coefficients_are_those_of_blending(device, backend):
    x, weight, bias, coef = layer(2, 3, 3, 5, device)
    coef.requires_grad_()
    (expected,) = torch.autograd.grad(merged(x, weight, bias, coef).square().sum(), coef)
    (got,) = torch.autograd.grad(run(backend, x, weight, bias, coef).square().sum(), coef)
    testing.assert_within_rule(got, expected, expected, terms=3 * 5)


@on_every_backend
def test_an_expert_with_coefficient_zero_takes_no_part_in_gradients(device, backend):
    x, weight, bias, coef = layer(3, 2, 2, 5, device)
    coef[0, 1], coef[1, 0] = 0, 0
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(3, 2, 5, dtype=torch.float64, device=device)
    expected = torch.autograd.grad(run(backend, *inputs, coef), inputs, grad)
    with torch.no_grad():
        weight[1, 2], bias[1, 0], grad[1, 0, 3] = torch.nan, torch.inf, torch.nan
    dx, dW, db = torch.autograd.grad(run(backend, *inputs, coef), inputs, grad)
    testing.assert_within_rule(dx[0], expected[0][0], expected[0][0], terms=5)
    testing.assert_within_rule(dW[0], expected[1][0], expected[1][0], terms=6)
    testing.assert_within_rule(db[0], expected[2][0], expected[2][0], terms=6)


@on_every_backend
def test_autocast_does_not_change_the_type(device, backend):
    args = [t.requires_grad_() for t in layer(2, 3, 2, 8, device, torch.float32)]
    got = run(backend, *args)
    grads = torch.autograd.grad(got, args, got.detach())
    with torch.autocast(device, torch.bfloat16):
        cast = run(backend, *args)
        cast_grads = torch.autograd.grad(cast, args, got.detach())
    assert torch.equal(cast, got) and cast.dtype == torch.float32
    assert all(map(torch.equal, cast_grads, grads))


def test_triton_reads_rows_as_wide_as_it_says():
    device = DEVICES[-1]
    if (reason := OP.why_not("triton", device)) is not None:
        pytest.skip(reason)
    assert_close("triton", *layer(1, 1, 2, 8192, device, torch.float32), 1e-5, None)
    for D, dtype in ((8193, torch.float32), (8193, torch.bfloat16), (4097, torch.float64)):
        args = (*layer(1, 1, 2, D, device, dtype), 1e-5, None)
        assert f"rows of {D} values, more than {D - 1}" in OP.why_not("triton", device, args)
    args = (*layer(1, 1, 65, 3, device), 1e-5, None)
    assert "65 experts, more than 64" in OP.why_not("triton", device, args)
    assert_close("torch", *args)


X, W, C = torch.ones(2, 3, 4), torch.ones(3, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((X[0, 0], W, None, C), {}, r"x must have at least two dimensions, got \(4,\)"),
        ((X, W[:, :3], None, C), {}, "x must have rows of length D = 3, got 4"),
        ((X, W, W[0], C), {}, r"bias must be \(N, D\) = \(3, 4\), got \(4,\)"),
        ((X, W, None, C[:, :2]), {}, "coef must have a value for each of N = 3 experts, got 2"),
        ((X, W, None, C[0, :2]), {}, "coef must have a value for each of N = 3 experts, got 2"),
        ((X, W, None, C[:1]), {}, "coef must have a row for each of B = 2 samples, got 1"),
        ((X, W, None, C[0, 0]), {}, r"coef must be \(B, N\) or \(N,\), got \(\)"),
        ((X, W, None, C.int()), {}, r"coef must be floating point, got torch.int32"),
        ((X, W.half(), None, C[:1]), {}, r"2 problems(?s:.*)weight must be(?s:.*)coef must have"),
        ((X, W, None, C, -1.0), {}, r"eps must be zero or positive, got -1.0"),
        ((X, W, None, C), {"residual": X[:, :2]}, r"residual must be \(2, 3, 4\) like x, got"),
    ],
)
def test_wrong_arguments_are_named(args, options, message):
    with pytest.raises(ValueError, match=f"mixture_layer_norm: {message}"):
        neulig_fast.mixture_layer_norm(*args, **options)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="mixture_layer_norm: coef must be a tensor, got list"):
        neulig_fast.mixture_layer_norm(X, W, None, [1.0, 2.0, 3.0])

"""expert_layer_norm beyond test_house.py: modules, residuals, cancellation, widths, errors."""

import pytest
import torch
from torch import nn

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS

OP = OPS["expert_layer_norm"]
DEVICES = testing.devices()
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)


def run(backend, *args, **options):
    with neulig_fast.use_backend(expert_layer_norm=backend):
        return neulig_fast.expert_layer_norm(*args, **options)


def assert_close(backend, *args):
    """The tolerance rule for one call of the op."""
    with neulig_fast.use_backend(expert_layer_norm=backend):
        testing.assert_op_close(OP, OP(*args), args)


def rows(N, R, D, device="cpu", dtype=torch.float64):
    """x, weight and bias."""
    shapes = (N, R, D), (N, D), (N, D)
    return tuple(torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes)


@on_every_backend
def test_equals_the_modules_of_the_experts(device, backend):
    x, weight, bias = rows(3, 8, 20, device)
    x = x.view(3, 2, 4, 20)
    expected = []
    for a, w, b in zip(x, weight, bias, strict=True):
        layer = nn.LayerNorm(20, eps=1e-6).to(device, torch.float64)
        layer.load_state_dict({"weight": w, "bias": b})
        expected.append(layer(a).detach())
    expected = torch.stack(expected)
    got = run(backend, x, weight, bias, 1e-6)
    testing.assert_within_rule(got, expected, expected, terms=20)
    without = run(backend, x, torch.ones_like(weight), None, 1e-6)
    testing.assert_within_rule(without * weight[:, None, None] + bias[:, None, None], expected,
                               expected, terms=20)  # fmt: skip


@on_every_backend
def test_a_residual_is_added_first_and_handed_on(device, backend):
    x, weight, bias = rows(2, 6, 33, device, torch.float32)
    beside = torch.randn(2, 6, 33).to(device)
    y, s = run(backend, x, weight, bias, residual=beside)
    assert torch.equal(s, x + beside)
    assert torch.equal(y, run(backend, s, weight, bias))


@in_every_dtype
@on_every_backend
def test_what_is_normalised_is_what_is_handed_on(device, backend, dtype):
    x, weight, bias = rows(2, 4, 16, device, dtype)
    beside = (100 * torch.randn(2, 4, 16)).to(device, dtype)  # much is lost in 8 bits
    y, s = run(backend, x, weight, bias, residual=beside)
    assert torch.equal(y, run(backend, s, weight, bias)) and s.dtype == dtype


@on_every_backend
def test_a_large_mean_does_not_cancel(device, backend):
    x, weight, bias = rows(2, 5, 300, device, torch.float32)
    assert_close(backend, x + 1e4, weight, bias, 1e-5, None)


@on_every_backend
def test_small_rows_know_eps_exactly(device, backend):
    x, weight, bias = rows(2, 5, 12, device)
    assert_close(backend, 1e-4 * x, weight, bias, 1e-5, None)  # eps is most of the deviation
    assert_close(backend, 1e-4 * x, weight, bias, 0.0, None)


@in_every_dtype
@on_every_backend
def test_constant_rows_and_single_values_give_the_bias(device, backend, dtype):
    for D in (1, 16):
        _, weight, bias = rows(2, 3, D, device, dtype)
        x = torch.full((2, 3, D), 1.5, device=device, dtype=dtype)
        assert torch.equal(run(backend, x, weight, bias), bias[:, None].expand(2, 3, D))


@in_every_dtype
@pytest.mark.parametrize("N, R, D", [(1, 1, 2), (3, 5, 7), (2, 70, 3), (2, 9, 1000), (1, 2, 4099)])
@on_every_backend
def test_sizes_that_divide_nothing(device, backend, N, R, D, dtype):
    x, weight, bias = rows(N, R, D, device, dtype)
    assert_close(backend, x, weight, bias, 1e-5, x.flip(1))


@in_every_dtype
@on_every_backend
def test_strided_rows_and_views_of_an_arena(device, backend, dtype):
    arena = torch.randn(3, 100).to(device, dtype)
    weight, bias = arena[:, 3:20], arena[:, 51:68]
    x = torch.randn(8, 3, 40).to(device, dtype)[::2, :, 5:22].transpose(0, 1)
    beside = torch.randn(3, 9, 17).to(device, dtype)[:, 1::2]
    assert_close(backend, x, weight, bias, 1e-5, beside)
    assert_close(backend, x, weight, bias, 1e-5, x)


@on_every_backend
def test_results_are_contiguous_also_of_what_is_not(device, backend):
    x, weight, bias = rows(3, 4, 5, device, torch.float32)
    x = x.transpose(0, 1).contiguous().transpose(0, 1)
    with neulig_fast.use_backend(expert_layer_norm=backend):
        torch.library.opcheck(OP.overload, (x, weight, bias, 1e-5, x))
    assert all(result.is_contiguous() for result in run(backend, x, weight, bias, residual=x))


@on_every_backend
def test_a_row_knows_nothing_of_the_others(device, backend):
    x, weight, bias = rows(2, 9, 17, device, torch.float32)
    expected = run(backend, x, weight, bias)
    other = x.clone()
    other[0, 3], other[1, 8], weight[0] = torch.nan, torch.inf, torch.nan
    got = run(backend, other, weight, bias)
    assert got[0].isnan().all() and got[1, 8].isnan().all()
    assert torch.equal(got[1, :8], expected[1, :8])


@on_every_backend
def test_empty_inputs(device, backend):
    for shape in ((2, 0, 5), (2, 3, 0, 5)):
        x, weight = torch.empty(shape, device=device), torch.ones(2, 5, device=device)
        assert run(backend, x, weight, None).shape == shape
        y, s = run(backend, x, weight, None, residual=x)
        assert y.shape == s.shape == shape


@on_every_backend
def test_autocast_does_not_change_the_type(device, backend):
    args = rows(2, 3, 8, device, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        got = run(backend, *args)
    assert torch.equal(got, run(backend, *args)) and got.dtype == torch.float32


def test_triton_reads_rows_as_wide_as_it_says():
    device = DEVICES[-1]
    if (reason := OP.why_not("triton", device)) is not None:
        pytest.skip(reason)
    assert_close("triton", *rows(1, 1, 16384, device, torch.float32), 1e-5, None)
    for D, dtype in ((16385, torch.float32), (16385, torch.bfloat16), (8193, torch.float64)):
        args = (*rows(1, 1, D, device, dtype), 1e-5, None)
        assert f"rows of {D} values, more than {D - 1}" in OP.why_not("triton", device, args)
        assert_close("torch", *args)
    x, weight, bias = rows(2, 4, 4, device)
    for args, name in (((x.mT, weight, bias, 1e-5, None), "x"),
                       ((x, weight, bias, 1e-5, x.mT), "residual")):  # fmt: skip
        assert f"{name}'s columns are not cont" in OP.why_not("triton", device, args)


def test_triton_writes_its_results_and_nothing_else():
    device = DEVICES[-1]
    if (reason := OP.why_not("triton", device)) is not None:
        pytest.skip(reason)
    from neulig_fast.kernels import _launch
    from neulig_fast.kernels._layer_norm import launches

    x, weight, bias = rows(3, 5, 7, device)
    buffer = torch.full((2 * 105 + 384,), 12345.0, device=device, dtype=torch.float64)
    y, s = buffer[128:233].view(3, 5, 7), buffer[361:466].view(3, 5, 7)
    _launch.run(x, launches(x, weight, bias, None, 1e-5, x, y, s))
    testing.assert_op_close(OP, (y, s), (x, weight, bias, 1e-5, x))
    beside = torch.cat([buffer[:128], buffer[233:361], buffer[466:]])
    assert (beside == 12345).all()


X, W = torch.ones(2, 3, 4), torch.ones(2, 4)


@pytest.mark.parametrize(
    "args, options, message",
    [
        ((X[0, 0], W, None), {}, r"x must have at least two dimensions, got \(4,\)"),
        ((X, W[0], None), {}, r"2 problems(?s:.*)weight must be \(N, D\) with N >= 1, got \(4,\)"),
        ((X, W[:, :3], None), {}, "x must have rows of length D = 3, got 4"),
        ((X[..., :0], W[:, :0], None), {}, r"x must have D >= 1, got 0"),
        ((X[:1], W, None), {}, "x must be of N = 2 experts, got 1"),
        ((X, W, W[0]), {}, r"bias must be \(N, D\) = \(2, 4\), got \(4,\)"),
        ((X, W.half(), None), {}, r"weight must be torch.float32 like x, got torch.float16"),
        ((X, W, None, -1e-5), {}, r"eps must be zero or positive, got -1e-05"),
        ((X, W, None, float("nan")), {}, r"eps must be zero or positive, got nan"),
        ((X, W, None), {"residual": X[:, :2]}, r"residual must be \(2, 3, 4\) like x, got"),
        ((X, W, None), {"residual": X.half()}, r"residual must be torch.float32 on cpu like x"),
    ],
)
def test_wrong_arguments_are_named(args, options, message):
    with pytest.raises(ValueError, match=f"expert_layer_norm: {message}"):
        neulig_fast.expert_layer_norm(*args, **options)


def test_what_is_no_tensor_is_named():
    with pytest.raises(TypeError, match="expert_layer_norm: residual must be a tensor, got list"):
        neulig_fast.expert_layer_norm(X, W, None, residual=[X])

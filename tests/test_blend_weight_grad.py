"""blend_weight_grad beyond test_house.py: closed forms, cancellation, long sums, errors."""

import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS

BACKENDS = testing.backends_of(OPS["blend_weight_grad"])
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)


def run(backend, *args):
    with neulig_fast.use_backend(blend_weight_grad=backend):
        return neulig_fast.blend_weight_grad(*args)


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@on_every_backend
def test_unit_vectors_pick_single_parameters(device, backend, dtype):
    params = torch.randn(3, 70).to(device, dtype)
    grad = torch.zeros(4, 70, device=device, dtype=dtype)
    picked = [0, 31, 32, 69]
    grad[range(4), picked] = 1
    expected = params[:, picked].T.to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(run(backend, grad, params), expected)


@on_every_backend
def test_integers_sum_exactly_over_segments(device, backend):
    params = torch.arange(300.0, device=device).view(2, 150)
    grad = torch.ones(150, device=device)
    got = run(backend, grad, params, [0, 0, 1, 100, 150])
    columns = [(0, 0), (0, 1), (1, 100), (100, 150)]
    assert got.tolist() == [[float(row[a:b].sum()) for row in params] for a, b in columns]


@on_every_backend
def test_a_long_sum_keeps_its_digits(device, backend):
    if backend == "triton" and device == "cpu":
        pytest.skip("a million columns take minutes in Triton's interpreter")
    width = 3_000_001
    params = torch.full((1, width), 0.1, device=device)
    got = run(backend, torch.full((width,), 0.1, device=device), params)
    exact = width * float(params[0, 0].double()) ** 2
    assert abs(float(got[0]) - exact) <= 1e-6 * exact


@on_every_backend
def test_rows_further_apart_than_two_to_the_31_elements(device, backend):
    stride = 2**31 + 64
    # Eight gigabytes of addresses, of which four pages are touched.
    buffer = torch.empty(stride + 1000, device=device)
    params = buffer.as_strided((2, 1000), (stride, 1))
    params[0], params[1] = 1.0, 2.0
    got = run(backend, torch.ones(1000, device=device), params)
    assert got.tolist() == [1000.0, 2000.0]


@on_every_backend
def test_blocks_of_cancelling_terms_cancel(device, backend):
    half = torch.randn(5000, generator=torch.Generator().manual_seed(3)).to(device)
    grad = torch.ones(10_000, device=device)
    params = torch.cat([half, -half])[None]
    scale = float(half.abs().sum())
    assert abs(float(run(backend, grad, params)[0])) <= torch.finfo(torch.float32).eps * scale


@on_every_backend
def test_k_rows_equal_k_calls(device, backend):
    params, grad = torch.randn(3, 5001).to(device), torch.randn(4, 5001).to(device)
    together = run(backend, grad, params)
    for row, g in zip(together, grad, strict=True):
        alone = run(backend, g, params)
        testing.assert_within_rule(row, alone, params.double() @ g.double(), terms=5001)


@on_every_backend
def test_it_is_the_gradient_of_blend(device, backend):
    weights = torch.randn(2, 3, 4, device=device, dtype=torch.float64, requires_grad=True)
    params = torch.randn(4, 90, device=device, dtype=torch.float64)
    seed, bounds = torch.randn(2, 90, device=device, dtype=torch.float64), [0, 10, 64, 90]
    expected = torch.autograd.grad(
        OPS["blend"].reference(weights, params, torch.tensor(bounds, device=device)), weights, seed
    )[0]
    got = run(backend, seed, params, bounds)
    testing.assert_within_rule(got, expected, expected, terms=90)


@on_every_backend
def test_backward_of_backward(device, backend):
    grad = torch.randn(2, 9, device=device, dtype=torch.float64, requires_grad=True)
    params = torch.randn(3, 9, device=device, dtype=torch.float64, requires_grad=True)
    with neulig_fast.use_backend(backend):
        assert torch.autograd.gradcheck(neulig_fast.blend_weight_grad, (grad, params))


@pytest.mark.parametrize(
    "args, message",
    [
        ((torch.ones(3), torch.ones(4)), r"blend_weight_grad: params must be \(N, P\)"),
        ((torch.ones(3), torch.ones(2, 4)), r"grad must be \(P,\) or \(K, P\), here P = 4"),
        ((torch.ones(4).half(), torch.ones(2, 4)), r"grad must be torch.float32 on cpu"),
        ((torch.ones(4), torch.ones(2, 4), [0, 3]), r"segments must ascend from 0 to P = 4"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=message):
        neulig_fast.blend_weight_grad(*args)

"""The C++ layers beyond test_house.py: both ways of mixing, bits, activations, skipped experts."""

import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS
from neulig_fast.ops import mixture_linear
from neulig_fast.ops.mixture_linear import mixture_linear_reference

needs_cpu = pytest.mark.skipif(
    OPS["mixture_linear"].why_not("cpu", "cpu") is not None, reason="no native cpu backend"
)


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(N, width, outputs, dtype=torch.float32):
    return normal(N, outputs, width, dtype=dtype, seed=1), normal(N, outputs, dtype=dtype, seed=2)


def forced(*args):
    with neulig_fast.use_backend(mixture_linear="cpu"):
        return OPS["mixture_linear"].overload(*args)


@needs_cpu
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
@pytest.mark.parametrize("N", [1, 2, 5, 9])
@pytest.mark.parametrize("T", [1, 2, 3, 13, 600])  # few rows, many, more than a group's
def test_every_size_of_a_sample_obeys_the_tolerance_rule(T, N, dtype):
    for width, outputs in ((300, 33), (8, 32), (1, 70)):
        weight, bias = layer(N, width, outputs, dtype)
        args = (normal(3, T, width, dtype=dtype), weight, bias, normal(3, N, seed=3), None)
        testing.assert_op_close(OPS["mixture_linear"], forced(*args), args)


@needs_cpu
def test_two_samples_by_hand():
    weight = torch.tensor([[[1.0, 2.0]], [[10.0, 0.0]]])  # N = 2, O = 1, I = 2
    x = torch.tensor([[[1.0, 1.0]], [[1.0, 3.0]]])
    y = mixture_linear(x, weight, torch.tensor([[0.5], [-1.0]]), torch.tensor([[1.0, 2.0], [0, 1]]))
    assert y.tolist() == [[[(3 + 0.5) + 2 * (10 - 1.0)]], [[10 - 1.0]]]


@needs_cpu
@pytest.mark.parametrize("T", [1, 7])  # mixing results, mixing weights
def test_a_samples_bits_do_not_depend_on_the_batch(T):
    weight, bias = layer(3, 77, 40)
    x, coef = normal(9, T, 77), normal(9, 3, seed=3)
    coef[2:4, 1] = 0  # fewer experts
    whole = forced(x, weight, bias, coef, "gelu")
    for b in range(9):
        alone = forced(x[b : b + 1], weight, bias, coef[b : b + 1], "gelu")
        assert torch.equal(whole[b : b + 1], alone)


@needs_cpu
@pytest.mark.parametrize("T", [1, 7])
def test_an_expert_without_a_share_is_not_read(T):
    weight, bias = layer(3, 20, 5)
    weight[1], bias[1] = torch.nan, torch.inf
    coef = torch.tensor([[0.3, 0.0, 0.7], [0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    y = forced(normal(3, T, 20), weight, bias, coef, None)
    assert y[:2].isfinite().all() and y[2].isnan().all()


BITS = """
import hashlib, torch, neulig_fast
from neulig_fast import testing
g = torch.Generator().manual_seed(0)
for dtype in testing.DTYPES:
    for T in (1, 40):
        x, w, b, c = (torch.randn(s, generator=g).to(dtype)
                      for s in ((9, T, 300), (5, 300, 300), (5, 300), (9, 5)))
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with neulig_fast.use_backend("cpu"):
                y = neulig_fast.mixture_linear(x, w, b, c.float(), activation="quick_gelu")
                z = neulig_fast.expert_linear(x, w, b, activation="gelu_tanh")
            print(*(hashlib.sha256(r.double().numpy().tobytes()).hexdigest() for r in (y, z)))
"""


@needs_cpu
@pytest.mark.slow
@pytest.mark.parametrize("level", [None, "0"])
def test_the_bits_do_not_depend_on_threads(python, level):
    done = python(BITS, NEULIG_FAST_CPU=level)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 16 and lines[::2] == lines[1::2]  # of one thread and of three


@needs_cpu
@pytest.mark.parametrize("level", ["0", "3", "4"])
def test_every_instruction_set_obeys_the_tolerance_rule(python, level):
    code = (
        "import torch, neulig_fast as nf\nfrom neulig_fast import testing\n"
        "for name in ('mixture_linear', 'expert_linear'):\n"
        "    op = nf._registry.OPS[name]\n"
        "    with nf.use_backend('cpu'):\n"
        "        for dtype in testing.DTYPES:\n"
        "            for args in op.samples('cpu', dtype):\n"
        "                testing.assert_op_close(op, op.overload(*args), args)\n"
    )
    done = python(code, NEULIG_FAST_CPU=level)
    if "the best level this CPU and build support" in done.stderr:
        pytest.skip("this CPU has no such instructions")
    assert done.returncode == 0, done.stderr


@needs_cpu
@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "quick_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_activations_of_the_whole_line(activation, dtype):
    x = torch.linspace(-40, 40, 4001, dtype=dtype)
    x = torch.cat((x, torch.tensor([0.0, -0.0, 1e30, torch.inf, torch.nan], dtype=dtype)))
    identity = torch.ones(1, 1, 1, dtype=dtype)
    y = forced(x.view(1, -1, 1), identity, None, torch.ones(1, 1), activation).flatten()
    args = (x.view(1, -1, 1), identity, None, torch.ones(1, 1))
    working = mixture_linear_reference(*args, activation).flatten()
    exact = mixture_linear_reference(*testing.cast(args, torch.float64), activation).flatten()
    testing.assert_within_rule(y, working, exact)
    # Also beside a scale of 1, not only of the largest result.
    small = x.abs() < 4
    testing.assert_within_rule(y[small], working[small], exact[small])


@needs_cpu
def test_gelu_keeps_its_digits_far_out():
    x = torch.linspace(-12, -4, 200)
    y = forced(x.view(1, -1, 1), torch.ones(1, 1, 1), None, torch.ones(1, 1), "gelu").flatten()
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    scaled = (y.double() / exact).float()  # 1 + relative errors: e^(-x^2 / 2) costs x^2 / 2 ulp
    testing.assert_within_rule(scaled, torch.ones(200), torch.ones(200).double(), terms=72**2)


@pytest.mark.parametrize("activation", [None, "gelu", "quick_gelu"])
def test_skipping_stays_within_its_bound(activation):
    weight, bias = layer(6, 30, 11, torch.float64)
    x = normal(4, 5, 30, dtype=torch.float64)
    coef = torch.softmax(3 * normal(4, 6, dtype=torch.float64, seed=3), 1)
    exact = mixture_linear(x, weight, bias, coef, activation=activation)
    y, bound = mixture_linear(x, weight, bias, coef, activation=activation, skip_below=0.1)
    kept = torch.where(coef < 0.1, 0.0, coef)
    assert torch.equal(y, mixture_linear(x, weight, bias, kept, activation=activation))
    error = (y - exact).abs().amax((1, 2))
    assert bound.shape == (4,) and (error <= bound).all() and (error > 0).any()
    assert (bound < 200 * error).all()  # not an empty promise


def test_the_bound_is_reached():
    x = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    weight = torch.stack((torch.zeros(1, 2), x[0])).double()
    bias = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    y, bound = mixture_linear(x, weight, bias, torch.tensor([[1.0, 0.01]]), skip_below=0.1)
    assert y.item() == 0 and abs(bound.item() - 0.01 * (25 + 2)) < 1e-8


def test_skipping_nothing_costs_nothing():
    weight, bias = layer(3, 8, 4)
    x, coef = normal(2, 3, 8), torch.tensor([0.2, 0.3, 0.5])  # of one model
    y, bound = mixture_linear(x, weight, bias, coef, skip_below=0.1)
    assert bound.tolist() == [0.0, 0.0] and torch.equal(y, mixture_linear(x, weight, bias, coef))


def test_what_takes_no_part_adds_nothing_to_the_bound():
    weight, bias = layer(3, 8, 4)
    weight[1, 0, 0], bias[1, 1] = torch.nan, torch.inf
    x = normal(2, 3, 8)
    y, bound = mixture_linear(x, weight, bias, torch.tensor([1.0, 0.0, 0.01]), skip_below=0.1)
    most = x.norm(dim=2).max() * weight[2].norm(dim=1).max() + bias[2].abs().max()
    torch.testing.assert_close(bound, (0.01 * most).expand(2))
    assert torch.equal(y, mixture_linear(x, weight, bias, torch.tensor([1.0, 0.0, 0.0])))


@pytest.mark.parametrize("limit", [float("nan"), -0.1])
def test_a_limit_below_which_nothing_is_skipped(limit):
    x, (weight, bias) = normal(2, 3, 8), layer(3, 8, 4)
    with pytest.raises(ValueError, match=f"skip_below must be zero or positive, got {limit}"):
        mixture_linear(x, weight, bias, torch.ones(3), skip_below=limit)

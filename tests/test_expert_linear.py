"""expert_linear beyond test_house.py: modules, arenas, sizes that divide nothing, errors."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS
from neulig_fast.ops._activation import ACTIVATIONS
from neulig_fast.ops.expert_linear import expert_linear_reference

OP = OPS["expert_linear"]
DEVICES = testing.devices()
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
FUNCTIONS = {
    None: nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
}


def run(backend, *args, **options):
    with neulig_fast.use_backend(expert_linear=backend):
        return neulig_fast.expert_linear(*args, **options)


def signs(*shape, device, dtype=torch.float32):
    """-1, 0 and 1: sums of up to 256 products are exact in every type and any order."""
    return torch.randint(-1, 2, shape).to(device, dtype)


def exact(x, weight, bias=None):
    """What signs add up to."""
    y = x.double() @ weight.double().mT
    return (y if bias is None else y + bias.double()[:, None]).to(x.dtype)


@pytest.mark.parametrize("activation", FUNCTIONS, ids=str)
@on_every_backend
def test_equals_the_modules_of_the_experts(device, backend, activation):
    layers = [nn.Linear(19, 23, device=device, dtype=torch.float64) for _ in range(3)]
    weight = torch.stack([layer.weight for layer in layers]).detach()
    bias = torch.stack([layer.bias for layer in layers]).detach()
    x = torch.randn(2, 9, 19, dtype=torch.float64).to(device)
    with torch.no_grad():
        expected = torch.stack([FUNCTIONS[activation](layer(x)) for layer in layers])
    got = run(backend, x, weight, bias, activation=activation)
    testing.assert_within_rule(got, expected, expected, terms=19)


@on_every_backend
def test_gradients_are_those_of_the_modules(device, backend):
    layers = [nn.Linear(5, 4, device=device, dtype=torch.float64) for _ in range(2)]
    weight = torch.stack([layer.weight for layer in layers]).detach().requires_grad_()
    x = torch.randn(3, 2, 5, dtype=torch.float64).to(device)
    sum(F.gelu(layer(x)).square().sum() for layer in layers).backward()
    bias = torch.stack([layer.bias for layer in layers]).detach().requires_grad_()
    run(backend, x, weight, bias, activation="gelu").square().sum().backward()
    for i, layer in enumerate(layers):
        testing.assert_within_rule(weight.grad[i], layer.weight.grad, layer.weight.grad, terms=24)
        testing.assert_within_rule(bias.grad[i], layer.bias.grad, layer.bias.grad, terms=24)


@in_every_dtype
@pytest.mark.parametrize(
    "R, O, I", [(1, 1, 1), (17, 1, 3), (5, 33, 64), (33, 17, 65), (70, 70, 130), (130, 129, 40)]
)
@on_every_backend
def test_sums_of_signs_are_exact_in_odd_sizes(device, backend, dtype, R, O, I):  # noqa: E741
    x, weight = signs(1, R, I, device=device, dtype=dtype), signs(2, O, I, device=device).to(dtype)
    bias = signs(2, O, device=device, dtype=dtype)
    assert torch.equal(run(backend, x, weight, bias)[:, 0], exact(x[0], weight, bias))


@in_every_dtype
@on_every_backend
def test_reads_views_of_an_arena_and_strided_inputs_as_they_are(device, backend, dtype):
    arena = torch.full((3, 900), torch.nan, device=device, dtype=dtype)
    arena[:, 5:600].copy_(signs(3, 595, device=device))
    arena[:, 700:717].copy_(signs(3, 17, device=device))
    weight, bias = arena[:, 5:600].view(3, 17, 35), arena[:, 700:717]
    wide = torch.full((2, 12, 50), torch.nan, device=device, dtype=dtype)
    x = wide[:, ::2, 7:42].copy_(signs(2, 6, 35, device=device))
    got = run(backend, x, weight, bias)
    assert torch.equal(got.flatten(1, 2), exact(x.flatten(0, 1), weight, bias))
    half = weight[:, 1::2]  # not every row of a matrix
    assert torch.equal(run(backend, x, half).flatten(1, 2), exact(x.flatten(0, 1), half))


@on_every_backend
def test_experts_further_apart_than_two_to_the_31_values(device, backend):
    stride = 2**31 + 48  # 4.3 GB of addresses, two pages of memory
    buffer = torch.empty(stride + 64, dtype=torch.bfloat16, device=device)
    weight = buffer.as_strided((2, 5, 9), (stride, 9, 1))
    bias = buffer[50:].as_strided((2, 5), (stride, 1))
    for view in (weight, bias):
        view.copy_(signs(*view.shape, device=device))
    x = signs(1, 3, 9, device=device, dtype=torch.bfloat16)
    assert torch.equal(run(backend, x, weight, bias)[:, 0], exact(x[0], weight, bias))


@on_every_backend
def test_inputs_of_their_own_or_one_for_all(device, backend):
    x, weight = torch.randn(2, 3, 21).to(device), torch.randn(4, 9, 21).to(device)
    shared = run(backend, x, weight)
    assert torch.equal(run(backend, x.expand(4, -1, -1, -1), weight), shared)
    own = torch.stack([x + i for i in range(4)])
    for i in range(4):
        alone = run(backend, own[i], weight[i : i + 1])[0]
        oracle = own[i].double() @ weight[i].double().T
        testing.assert_within_rule(run(backend, own, weight)[i], alone, oracle, terms=21)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_every_backend
def test_a_long_sum_keeps_its_digits(device, backend, dtype):
    args = torch.randn(3, 5000), torch.randn(2, 4, 5000), torch.randn(2, 4), None
    args = tuple(a if a is None else a.to(device, dtype) for a in args)
    with neulig_fast.use_backend(expert_linear=backend):
        testing.assert_op_close(OP, OP(*args), args)


@on_every_backend
def test_a_row_knows_nothing_of_the_others(device, backend):
    x, weight = torch.randn(5, 7, 33).to(device), torch.randn(2, 20, 33).to(device)
    other = torch.randn(5, 7, 33).to(device)
    other[0], other[3, 2], other[1] = torch.nan, x[3, 2], torch.inf
    assert torch.equal(run(backend, x, weight)[:, 3, 2], run(backend, other, weight)[:, 3, 2])


@pytest.mark.parametrize("sizes", [(1, 2, 16), (17, 40, 64), (65, 70, 150)], ids=str)
def test_triton_gives_a_row_the_same_bits_in_batches_of_one_class(sizes):
    if (reason := OP.why_not("triton", "cuda")) is not None:
        pytest.skip(reason)  # products of the interpreter, NumPy's, depend on a row's place
    x, weight = torch.randn(1, 150, 40).cuda(), torch.randn(1, 70, 40).cuda()
    whole = run("triton", x[:, -sizes[-1] :], weight)
    for rows in sizes:  # the last ones, at other places in their tiles
        assert torch.equal(run("triton", x[:, -rows:], weight), whole[..., -rows:, :])


@on_every_backend
def test_an_expert_knows_nothing_of_the_others(device, backend):
    x, weight = torch.randn(1, 20, 6).to(device), torch.randn(3, 5, 6).to(device)
    weight[1] = torch.nan
    got = run(backend, x, weight)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("activation", list(FUNCTIONS)[1:])
@on_every_backend
def test_activations_far_out(device, backend, activation, dtype):
    huge = torch.finfo(dtype).max / 2
    ends = torch.tensor([huge, -huge, 1e4, -1e4, 0.0, torch.nan, torch.inf], dtype=dtype)
    x = torch.cat([torch.linspace(-9, 9, 57, dtype=dtype), ends]).to(device)[None, :, None]
    got = run(backend, x, torch.ones(1, 1, 1, device=device, dtype=dtype), activation=activation)
    expected = FUNCTIONS[activation](x)[None]
    assert torch.equal(got[:, :, :-1].isnan(), expected[:, :, :-1].isnan())
    if backend != "torch":  # PyTorch's own gelu of infinity is NaN with AVX-512
        assert got[..., -1, 0].isposinf().all()
    for a, b in zip(got[0, 0, :-2], expected[0, 0, :-2], strict=True):  # each at its own scale
        one = torch.ones_like(b) if b.abs() < 1 else b
        testing.assert_within_rule(a - b + one, one, one.double())


@pytest.mark.parametrize("activation", FUNCTIONS, ids=str)
@on_every_backend
def test_nothing_in_gives_the_bias_or_nothing(device, backend, activation):
    bias = torch.randn(2, 4).to(device)
    got = run(backend, torch.empty(3, 2, 0, device=device), torch.empty(2, 4, 0, device=device),
              bias, activation=activation)  # fmt: skip
    expected = FUNCTIONS[activation](bias)[:, None, None].expand(2, 3, 2, 4)
    testing.assert_within_rule(got, expected, FUNCTIONS[activation](bias.double())[:, None, None]
                               .expand(2, 3, 2, 4))  # fmt: skip
    for B, T, O in ((0, 2, 4), (3, 0, 4), (3, 2, 0)):  # noqa: E741
        x, weight = torch.empty(B, T, 5, device=device), torch.empty(2, O, 5, device=device)
        assert run(backend, x, weight, activation=activation).shape == (2, B, T, O)


@on_every_backend
def test_autocast_does_not_change_the_type(device, backend):
    args = [torch.randn(2, n, 8).to(device).requires_grad_() for n in (3, 4)]
    got = run(backend, *args)
    grads = torch.autograd.grad(got, args, got.detach())
    with torch.autocast(device, torch.bfloat16):
        cast = run(backend, *args)
        cast_grads = torch.autograd.grad(cast, args, got.detach())
    assert torch.equal(cast, got) and cast.dtype == torch.float32
    assert all(map(torch.equal, cast_grads, grads))


def test_triton_says_what_it_cannot_read():
    if (reason := OP.why_not("triton", DEVICES[-1])) is not None:
        pytest.skip(reason)
    x, weight = torch.ones(4, 6, device=DEVICES[-1]), torch.ones(2, 6, 6, device=DEVICES[-1])
    for args, reason in (
        ((x, weight.mT), "weight's columns are not contiguous (stride 6)"),
        ((x, weight, torch.ones(6, 2, device=DEVICES[-1]).T), "bias's columns are not contiguous"),
        ((x, torch.ones(65, 6, 6, device=DEVICES[-1])), "65 experts, more than 64"),
    ):
        args = (*args, None, None)[:4]
        assert reason in OP.why_not("triton", DEVICES[-1], args)
        assert OP(*args).equal(expert_linear_reference(*args))  # by another backend
        with (
            neulig_fast.use_backend(expert_linear="triton"),
            pytest.raises(RuntimeError, match="'triton' was asked for but cannot run"),
        ):
            OP(*args)


def test_triton_writes_its_result_and_nothing_else():
    if (reason := OP.why_not("triton", DEVICES[-1])) is not None:
        pytest.skip(reason)
    from neulig_fast.kernels import _launch
    from neulig_fast.kernels.expert_linear import launches

    x, weight = (signs(*shape, device=DEVICES[-1]) for shape in ((19, 7), (2, 21, 7)))
    buffer = torch.full((2 * 19 * 21 + 256,), 12345.0, device=DEVICES[-1])
    out = buffer[128:-128].view(2, 19, 21)
    _launch.run(x, launches(x, weight, None, None, out))
    assert torch.equal(out, exact(x, weight))
    assert (buffer[:128] == 12345).all() and (buffer[-128:] == 12345).all()


X, W = torch.ones(2, 3, 4), torch.ones(2, 5, 4)


@pytest.mark.parametrize(
    "args, message",
    [
        ((X[0], W), r"x must be \(B, T, I\) or \(N, B, T, I\), got \(3, 4\)"),
        ((X, W[0]), r"weight must be \(N, O, I\) with N >= 1, got \(5, 4\)"),
        ((X, W[:0]), r"weight must be \(N, O, I\) with N >= 1, got \(0, 5, 4\)"),
        ((X[..., :3], W), "x must have rows of length I = 4, got 3"),
        ((X.expand(3, 2, 3, 4), W), "x must be of N = 2 experts, got 3"),
        ((X, W, torch.ones(5)), r"bias must be \(N, O\) = \(2, 5\), got \(5,\)"),
        ((X, W.half()), r"weight must be torch.float32 like x, got torch.float16"),
        (
            (X, W, torch.ones(2, 5).double()),
            r"bias must be torch.float32 like x, got torch.float64",
        ),
        ((X.int(), W.int()), r"x must be fp32, bf16, fp16 or fp64, got torch.int32"),
        ((X, W.to("meta")), r"weight must be on cpu like x, got meta"),
        ((X.half()[..., :1], W), r"2 problems(?s:.*)weight must be(?s:.*)x must have"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=f"expert_linear: {message}"):
        neulig_fast.expert_linear(*args)


def test_an_unknown_activation_and_what_is_no_tensor():
    with pytest.raises(ValueError, match=r"None or one of relu, .*got 'gelo'; did you mean 'gelu'"):
        neulig_fast.expert_linear(X, W, activation="gelo")
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        neulig_fast.expert_linear(X, [W])


@on_every_backend
def test_maps_are_read_as_rows(device, backend):
    x, weight = signs(2, 9, 6, device=device).mT, signs(2, 5, 9, device=device)
    assert torch.equal(run(backend, x, weight), run(backend, x.contiguous(), weight))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_the_library_multiplies_is_the_layer(activation):
    from neulig_fast.kernels._gemm import library_product

    x, weight = torch.randn(3, 6, 9).double(), torch.randn(3, 5, 9).double()
    bias = torch.randn(3, 5).double()
    for rows, shift in ((x, bias), (x[0], bias), (x, None)):
        out = torch.full((3, 6, 5), torch.nan).double()
        library_product(rows, weight, shift, activation, out)
        torch.testing.assert_close(out, expert_linear_reference(rows, weight, shift, activation))

"""mixture_linear beyond test_house.py: merged models, experts, masks, samples apart, errors."""

import pytest
import torch
from torch.nn import functional as F

import neulig_fast
from neulig_fast import testing
from neulig_fast._registry import OPS

OP = OPS["mixture_linear"]
DEVICES = testing.devices()
BACKENDS = testing.backends_of(OP)
on_every_backend = pytest.mark.parametrize("device, backend", BACKENDS)
in_every_dtype = pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "quick_gelu")


def run(backend, *args, **options):
    with neulig_fast.use_backend(mixture_linear=backend):
        return neulig_fast.mixture_linear(*args, **options)


def layer(B, T, N, O, I, device="cpu", dtype=torch.float64):  # noqa: E741
    """x, weight, bias and coefficients that do not sum to one."""
    shapes = (B, T, I), (N, O, I), (N, O), (B, N)
    return tuple(torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in shapes)


def blended(weight, bias, w):
    """The parameters of the merged model of one sample."""
    return torch.einsum("n,noi->oi", w, weight), torch.einsum("n,no->o", w, bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@on_every_backend
def test_equals_the_layer_of_every_merged_model(device, backend, activation):
    x, weight, bias, coef = layer(3, 7, 4, 19, 23, device)
    pre = torch.stack(
        [F.linear(a, *blended(weight, bias, w)) for a, w in zip(x, coef, strict=True)]
    )
    expected = {
        None: lambda y: y,
        "relu": F.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    }[activation](pre)
    got = run(backend, x, weight, bias, coef, activation=activation)
    testing.assert_within_rule(got, expected, expected, terms=4 * 23)


@in_every_dtype
@on_every_backend
def test_one_hot_rows_give_the_layer_of_that_expert(device, backend, dtype):
    x, weight, bias, _ = layer(3, 5, 3, 18, 20, device, dtype)
    got = run(backend, x, weight, bias, torch.eye(3, device=device)[[2, 0, 1]])
    for y, a, i in zip(got, x, (2, 0, 1), strict=True):
        working, oracle = F.linear(a, weight[i], bias[i]), F.linear(
            a.double(), weight[i].double(), bias[i].double()
        )  # fmt: skip
        testing.assert_within_rule(y, working, oracle, terms=20)


@on_every_backend
def test_identical_experts_are_their_merged_model(device, backend):
    x, weight, bias, coef = layer(4, 3, 5, 9, 11, device)
    weight, bias = weight[:1].expand(5, -1, -1), bias[:1].expand(5, -1)
    got = run(backend, x, weight, bias, coef.softmax(1))
    expected = F.linear(x, weight[0], bias[0])
    testing.assert_within_rule(got, expected, expected, terms=5 * 11)


@on_every_backend
def test_the_order_of_the_experts_does_not_matter(device, backend):
    x, weight, bias, coef = layer(2, 5, 6, 8, 9, device)
    order = [3, 0, 5, 1, 4, 2]
    expected = run(backend, x, weight, bias, coef)
    got = run(backend, x, weight[order], bias[order], coef[:, order])
    testing.assert_within_rule(got, expected, expected, terms=6 * 9)


@on_every_backend
def test_one_vector_for_the_batch_is_that_vector_for_each(device, backend):
    x, weight, bias, coef = layer(4, 40, 3, 21, 10, device)  # 160 rows: merging first pays
    expected = run(backend, x, weight, bias, coef[:1].expand(4, -1))
    got = run(backend, x, weight, bias, coef[0])
    testing.assert_within_rule(got, expected, expected, terms=3 * 10)
    image = x.view(4, 5, 8, 10)  # any dimensions between
    assert torch.equal(run(backend, image, weight, bias, coef[0]), got.view(4, 5, 8, 21))


@in_every_dtype
@pytest.mark.parametrize("T", [3, 250], ids=["by expert", "merged first"])
@on_every_backend
def test_an_expert_with_coefficient_zero_takes_no_part(device, backend, T, dtype):
    x, weight, bias, _ = layer(1, T, 3, 17, 9, device, dtype)
    coef = torch.tensor([[0.5, 0.0, -1.5]], device=device)
    args = x, weight, bias, coef, None
    expected = OP.reference(*args), OP.reference(*testing.cast(args, torch.float64))
    weight[1, 3], weight[1, 5], bias[1] = torch.nan, torch.inf, -torch.inf
    got = run(backend, x, weight, bias, coef)
    testing.assert_within_rule(got, *expected, terms=3 * 9)


@on_every_backend
def test_a_zero_masks_in_its_own_sample_only(device, backend):
    x, weight, bias, _ = layer(3, 2, 2, 5, 4, device, torch.float32)
    weight[0] = torch.nan
    coef = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-0.0, 2.0]], device=device)
    got = run(backend, x, weight, bias, coef)
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()
    coef[0, 1] = torch.nan  # a coefficient that is none is no zero
    assert run(backend, x, weight, bias, coef)[0].isnan().all()


@pytest.mark.parametrize("T", [1, 40], ids=["by results", "by weights"])
@on_every_backend
def test_without_any_expert_it_is_the_activation_of_zero(device, backend, T):
    x, weight, bias, coef = layer(2, T, 2, 4, 5, device, torch.float32)
    weight[0], x[0, 0, 0], x[1, 0] = torch.nan, torch.inf, torch.nan
    got = run(backend, x, weight, bias, torch.zeros_like(coef), activation="gelu")
    assert torch.equal(got, torch.zeros_like(got))


@in_every_dtype
@on_every_backend
def test_a_sample_knows_nothing_of_the_others(device, backend, dtype):
    x, weight, bias, coef = layer(5, 7, 3, 20, 33, device, dtype)
    expected = run(backend, x, weight, bias, coef)[2]
    x[[0, 1]], coef[3], coef[4, 0] = torch.nan, torch.inf, 0.0
    assert torch.equal(run(backend, x, weight, bias, coef)[2], expected)


@in_every_dtype
@on_every_backend
def test_strided_inputs_arenas_and_coefficients(device, backend, dtype):
    arena = torch.full((3, 900), torch.nan, device=device, dtype=dtype)
    weight, bias = arena[:, 5:600].view(3, 17, 35), arena[:, 700:717]
    x = torch.full((2, 12, 50), torch.nan, device=device, dtype=dtype)[:, ::2, 7:42]
    for view in (weight, bias, x):
        view.copy_(torch.randint(-1, 2, view.shape))
    coef = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 1.0]], device=device).T.contiguous().T
    expected = torch.einsum("bn,bti,noi->bto", coef.double(), x.double(), weight.double())
    expected += (coef.double() @ bias.double())[:, None]
    for w in (coef, coef.double(), coef.bfloat16()):  # exact in every type
        assert torch.equal(run(backend, x, weight, bias, w), expected.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B, T, N, O, I", [(2, 1, 2, 3, 5000), (1, 17, 3, 65, 65), (33, 1, 1, 1, 1),
                                           (1, 1, 40, 5, 7), (3, 45, 2, 70, 6)])  # fmt: skip
@on_every_backend
def test_sizes_that_divide_nothing(device, backend, B, T, N, O, I, dtype):  # noqa: E741
    args = (*layer(B, T, N, O, I, device, dtype), "gelu")
    with neulig_fast.use_backend(mixture_linear=backend):
        testing.assert_op_close(OP, OP(*args), args)


@on_every_backend
def test_empty_inputs(device, backend):
    for B, T, O in ((0, 2, 4), (3, 0, 4), (3, 2, 0)):  # noqa: E741
        x, weight, bias, coef = layer(B, T, 2, O, 5, device)
        assert run(backend, x, weight, bias, coef).shape == (B, T, O)
        assert run(backend, x, weight, None, torch.ones(2, device=device)).shape == (B, T, O)
    x, weight, bias, coef = layer(3, 2, 2, 4, 0, device)
    expected = (coef @ bias)[:, None].expand(3, 2, 4)
    testing.assert_within_rule(run(backend, x, weight, bias, coef), expected, expected, terms=2)


@on_every_backend
def test_gradients_of_coefficients_are_those_of_blending(device, backend):
    x, weight, bias, coef = layer(2, 3, 3, 5, 4, device)
    coef.requires_grad_()
    F.gelu(
        torch.stack([F.linear(a, *blended(weight, bias, w)) for a, w in zip(x, coef, strict=True)])
    ).square().sum().backward()
    expected, coef.grad = coef.grad, None
    run(backend, x, weight, bias, coef, activation="gelu").square().sum().backward()
    testing.assert_within_rule(coef.grad, expected, expected, terms=3 * 5 * 4)


@on_every_backend
def test_an_expert_with_coefficient_zero_takes_no_part_in_gradients(device, backend):
    x, weight, bias, coef = layer(3, 2, 2, 5, 4, device)
    coef[0, 1], coef[1, 0] = 0, 0
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(3, 2, 5, dtype=torch.float64, device=device)
    grad[2] = 0
    expected = torch.autograd.grad(run(backend, *inputs, coef), inputs, grad)
    with torch.no_grad():
        weight[1, 2, 1], bias[1, 0], x[1, 0, 3] = torch.nan, torch.inf, torch.nan
    dx, dW, db = torch.autograd.grad(run(backend, *inputs, coef), inputs, grad)
    assert torch.equal(dx[0], expected[0][0])
    assert torch.equal(dW[0], expected[1][0]) and torch.equal(db[0], expected[2][0])


@on_every_backend
def test_autocast_does_not_change_the_type(device, backend):
    args = [t.requires_grad_() for t in layer(2, 3, 2, 5, 4, device, torch.float32)]
    got = run(backend, *args)
    grads = torch.autograd.grad(got, args, got.detach())
    with torch.autocast(device, torch.bfloat16):
        cast = run(backend, *args)
        cast_grads = torch.autograd.grad(cast, args, got.detach())
    assert torch.equal(cast, got) and cast.dtype == torch.float32
    assert all(map(torch.equal, cast_grads, grads))


X, W, C = torch.ones(2, 3, 4), torch.ones(3, 5, 4), torch.ones(2, 3)


@pytest.mark.parametrize(
    "args, message",
    [
        ((X[0, 0], W, None, C), r"x must be \(B, ..., I\), got \(4,\)"),
        ((X, W[:, 0], None, C), r"weight must be \(N, O, I\) with N >= 1, got \(3, 4\)"),
        ((X[..., :3], W, None, C), r"x must have rows of length I = 4, got 3"),
        ((X[..., :3], W, None, C[0]), r"x must have rows of length I = 4, got 3"),
        ((X, W, torch.ones(3, 4), C), r"bias must be \(N, O\) = \(3, 5\), got \(3, 4\)"),
        ((X, W, None, C[:, :2]), r"coef must have a value for each of N = 3 experts, got 2"),
        ((X, W, None, C[0, :2]), r"coef must have a value for each of N = 3 experts, got 2"),
        ((X, W, None, C[:1]), r"coef must have a row for each of B = 2 samples, got 1"),
        ((X, W, None, C.T), r"2 problems(?s:.*)coef must(?s:.*)coef must"),
        ((X, W, None, C[None]), r"coef must be \(B, N\) or \(N,\), got \(1, 2, 3\)"),
        ((X, W, None, C.int()), r"coef must be floating point, got torch.int32"),
        ((X, W, None, C.to("meta")), r"coef must be on cpu like x, got meta"),
        ((X, W.half(), None, C), r"weight must be torch.float32 like x, got torch.float16"),
        ((X, W.half(), None, C[:1]), r"2 problems(?s:.*)weight must be(?s:.*)coef must have"),
    ],
)
def test_wrong_arguments_are_named(args, message):
    with pytest.raises(ValueError, match=f"mixture_linear: {message}"):
        neulig_fast.mixture_linear(*args)


def test_an_unknown_activation_and_what_is_no_tensor():
    with pytest.raises(ValueError, match=r"None or one of relu, .*got 'rely'; did you mean 'relu'"):
        neulig_fast.mixture_linear(X, W, None, C, activation="rely")
    with pytest.raises(TypeError, match="coef must be a tensor, got list"):
        neulig_fast.mixture_linear(X, W, None, [1.0])


def test_triton_says_what_it_cannot_read():
    device = DEVICES[-1]
    if (reason := OP.why_not("triton", device)) is not None:
        pytest.skip(reason)
    x, weight, bias, coef = layer(2, 6, 2, 6, 6, device)
    for args, reason in (
        ((x, weight.mT, bias, coef), "weight's columns are not contiguous (stride 6)"),
        ((x, weight, bias[:1, :1].expand(2, 6), coef), "bias's columns are not contiguous"),
        (layer(2, 6, 65, 6, 6, device), "65 experts, more than 64"),
    ):
        assert reason in OP.why_not("triton", device, (*args, None))
        assert OP(*args, None).shape == (2, 6, 6)  # by another backend


def test_triton_writes_its_result_and_nothing_else():
    device = DEVICES[-1]
    if (reason := OP.why_not("triton", device)) is not None:
        pytest.skip(reason)
    from neulig_fast.kernels import _launch
    from neulig_fast.kernels.mixture_linear import by_merging, launches

    args = layer(1, 19, 3, 21, 7, device)
    expected = OP.reference(*args)
    for merges in (False, True):
        buffer = torch.full((19 * 21 + 256,), 12345.0, device=device, dtype=torch.float64)
        out = buffer[128:-128].view(1, 19, 21)
        if merges:
            by_merging(*args, None, out)
        else:
            _launch.run(args[0], launches(*args, None, out))
        testing.assert_within_rule(out, expected, expected, terms=3 * 7)
        assert (buffer[:128] == 12345).all() and (buffer[-128:] == 12345).all()


@pytest.mark.parametrize("experts", [1, 3, 8, 9, 20])
def test_triton_merges_the_weights_of_a_few_samples_at_a_time(monkeypatch, experts):
    device = DEVICES[-1]
    if (reason := OP.why_not("triton", device)) is not None:
        pytest.skip(reason)
    from neulig_fast.kernels import mixture_linear

    x, weight, bias, coef = layer(5, 6, experts, 7, 9, device)
    coef[1, 0], weight[0, 0, 0] = 0, torch.nan  # which takes no part in sample 1
    merge, merged = mixture_linear.merge_launch, []
    monkeypatch.setattr(mixture_linear, "MERGED_BYTES", 2 * weight[0].nbytes)
    monkeypatch.setattr(
        mixture_linear, "merge_launch", lambda *args: merged.append(len(args[2])) or merge(*args)
    )
    out = torch.full((5, 6, 7), 12345.0, device=device, dtype=x.dtype)
    mixture_linear.by_merging(x, weight, bias, coef, "gelu", out)
    assert merged == [2, 2, 1]
    expected = OP.reference(x, weight, bias, coef, "gelu")
    assert not expected[1].isnan().any() and expected[0].isnan().any()
    testing.assert_within_rule(out, expected, expected, terms=experts * 9)


@on_every_backend
def test_maps_are_read_as_rows(device, backend):
    x, weight, bias, coef = layer(2, 6, 3, 7, 9, device)
    got = run(backend, x.mT.contiguous().mT, weight, bias, coef)
    expected = OP.reference(x, weight, bias, coef)
    testing.assert_within_rule(got, expected, expected, terms=3 * 9)

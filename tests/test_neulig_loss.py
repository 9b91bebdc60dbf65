"""neulig_loss beyond test_house.py: golden case 1, gradients in every combination, errors."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import neulig_fast
from neulig_fast import testing
from neulig_fast.neulig.penalty import alignment_penalty
from neulig_fast.offsets import OffsetStats
from neulig_fast.ops.neulig_loss import OP, neulig_loss, neulig_loss_reference
from neulig_fast.ops.offset_gram import offset_gram

EXACT = 1e-12  # the published agreement of the golden case
BACKENDS = [b for b in ("torch", "cpu") if OP.why_not(b, "cpu") is None]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    """Every test of this file runs on every backend."""
    with neulig_fast.use_backend(neulig_loss=request.param, neulig_loss_backward=request.param):
        yield request.param


@pytest.fixture(scope="module")
def case():
    """Golden case 1: N=3, B=4, D=5, C=6, P=109, every intermediate value in float64."""
    text = (Path(__file__).parent / "data" / "neulig_case1.json").read_text()
    values = json.loads(text)
    tensors = {
        key: torch.tensor(value, dtype=torch.float64)
        for key, value in values.items()
        if key != "about"
    }
    return SimpleNamespace(**{**tensors, "targets": torch.tensor(values["targets"]).long()})


def near(actual, expected):
    return bool((actual - expected).abs().max() <= EXACT)


def encode(theta, x):
    """The case's encoder, Linear(7, 8) -> tanh -> Linear(8, 5), from a flat row."""
    b1, w1, b2, w2 = theta.split([8, 56, 5, 40])
    hidden = torch.tanh(x @ w1.view(8, 7).T + b1)
    return hidden @ w2.view(5, 8).T + b2


def run(case, alignment, **options):
    w = case.portland_weight_W.clone().requires_grad_()
    c = case.portland_bias_c.clone().requires_grad_()
    out = neulig_loss(case.features_Z, w, c, case.head_H, None, case.targets, alignment, **options)
    out.loss.backward()
    return out, w.grad, c.grad


# -- golden case 1 ---------------------------------------------------------------------------------


def test_case_features_and_coopvec(case):
    z = torch.stack([encode(theta, case.inputs_X) for theta in case.experts_theta], 1)
    assert near(z, case.features_Z)
    out, _, _ = run(case, torch.zeros(3, 3, dtype=torch.float64))
    assert near(out.coopvec, case.coopvec_w)


@pytest.mark.parametrize("boosting, prefix", [("supervised", "sup"), ("entropy", "semi")])
def test_case_losses_and_gradients(case, boosting, prefix):
    s = case.offset_zscores_s
    out, grad_w, grad_c = run(case, torch.outer(s, s), boosting=boosting)
    expected = {key: getattr(case, f"{prefix}_{key}") for key in ("boosting", "alignment", "loss")}
    for key, value in expected.items():
        assert near(getattr(out, key), value), key
    assert near(grad_w, getattr(case, f"{prefix}_grad_W"))
    assert near(grad_c, getattr(case, f"{prefix}_grad_c"))


@pytest.mark.parametrize("boosting, prefix", [("supervised", "sup"), ("entropy", "semi")])
def test_case_gradient_of_the_portland_logits(case, boosting, prefix):
    """One sample at a time, ∂L/∂c is ∂L/∂a_b; the batch's mean makes it B times larger."""
    s = case.offset_zscores_s
    for b in range(4):
        part = SimpleNamespace(**vars(case))
        part.features_Z, part.targets = case.features_Z[b : b + 1], case.targets[b : b + 1]
        _, _, grad_c = run(part, torch.outer(s, s), boosting=boosting)
        assert near(grad_c / 4, getattr(case, f"{prefix}_grad_portland_logits")[b])


def test_case_logits_and_residuals(case):
    e = (case.coopvec_w.unsqueeze(1) @ case.features_Z).squeeze(1)
    y = (e / e.norm(dim=1, keepdim=True)) @ case.head_H.T
    assert near(y, case.logits_y)
    assert near(case.coopvec_w @ case.offset_zscores_s, case.alignment_residual_r)
    rank_one = (case.alignment_residual_r**2).mean() / 100
    assert near(rank_one, case.sup_alignment)


def test_case_offset_statistics(case):
    bounds = [0, 8, 64, 69, 109]
    sums, gram = offset_gram(case.experts_theta, bounds)
    stats = OffsetStats(sums, gram, ("fc1_bias", "fc1_weight", "fc2_bias", "fc2_weight"))
    for k, name in enumerate(stats.labels):
        assert near(stats.gram[k], getattr(case, f"gram_{name}")), name
    assert near(stats.total().sums, case.offset_sums_S)
    assert near(stats.zscores, case.offset_zscores_s)
    assert near(stats.total_gram, case.gram_G)
    penalty = alignment_penalty("offset_sum", stats)
    out, _, _ = run(case, penalty.matrix, scaling=penalty.scaling)
    assert near(out.alignment, case.sup_alignment)


def test_case_gram_penalty(case):
    out, _, grad_c = run(case, case.gram_G)
    assert near(out.alignment, case.gram_alignment_unnormalised)
    assert near(out.loss, case.gram_loss)
    boosting_only, _, grad_c0 = run(case, torch.zeros(3, 3, dtype=torch.float64))
    assert near(grad_c - grad_c0, case.gram_grad_portland_logits_alignment.sum(0))
    assert near(boosting_only.loss, case.sup_boosting)


def test_case_variance_penalty(case):
    diagonal = case.gram_G.diagonal()
    half = 0.5 * (diagonal[:, None] + diagonal[None, :] - 2 * case.gram_G)
    per_sample = ((case.coopvec_w @ half) * case.coopvec_w).sum(1)
    assert near(per_sample, case.variance_penalty_V)
    zero = torch.zeros_like(half)
    out, grad_w, grad_c = run(case, half)
    _, grad_w0, grad_c0 = run(case, zero)
    assert near(out.alignment, case.variance_penalty_V.mean() / 100)
    assert near(grad_c - grad_c0, case.grad_mean_V_over_100.sum(0))
    assert near(grad_w - grad_w0, case.grad_mean_V_over_100.T @ case.features_Z.flatten(1))


def test_case_dispersion_penalty(case):
    out, grad_w, grad_c = run(case, case.gram_G, scaling=1.0, centered=True)
    _, grad_w0, grad_c0 = run(case, torch.zeros(3, 3, dtype=torch.float64))
    assert near(out.alignment, case.dispersion_penalty)
    assert near(grad_c - grad_c0, case.grad_dispersion.sum(0))
    assert near(grad_w - grad_w0, case.grad_dispersion.T @ case.features_Z.flatten(1))


# -- gradients and numerics ------------------------------------------------------------------------

COMBINATIONS = list(product(("supervised", "entropy"), (True, False), (True, False), (True, False)))


@pytest.mark.parametrize("boosting, normalize, centered, biased", COMBINATIONS)
def test_gradcheck_in_every_combination(boosting, normalize, centered, biased):
    """All float inputs, all four outputs, and an alignment matrix that is not symmetric."""
    torch.manual_seed(5)
    B, N, D, C = 5, 3, 4, 3
    shapes = [(B, N, D), (N, N * D), (N,), (C, D), (C,), (N, N)]
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    targets = torch.tensor([0, 2, 1, 1, 0]) if boosting == "supervised" else None

    def call(z, w, c, head, bias, a):
        return tuple(
            neulig_loss(
                z, w, c, head, bias if biased else None, targets, a,
                boosting=boosting, scaling=3.0, normalize=normalize, centered=centered,
            )
        )  # fmt: skip

    if biased:
        assert torch.autograd.gradcheck(call, inputs)
    else:
        del inputs[4]
        assert torch.autograd.gradcheck(
            lambda z, w, c, head, a: call(z, w, c, head, None, a), inputs
        )


def test_only_the_portland_gradients_are_formed_when_only_they_are_needed():
    z, w, c, head, bias, t, a, *rest = next(OP.samples("cpu", torch.float32))
    w.requires_grad_()
    out = neulig_loss(z, w, c, head, bias, t, a, scaling=rest[1])
    (grad,) = torch.autograd.grad(out.loss, w)
    assert grad.shape == w.shape
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(out.loss, z)


def test_double_backward_says_that_it_is_not_there():
    z, w, c, head, bias, t, a, *_ = next(OP.samples("cpu", torch.float64))
    w.requires_grad_()
    (grad,) = torch.autograd.grad(neulig_loss(z, w, c, head, bias, t, a).loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match="neulig_loss_backward: not differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_features_accumulate_in_fp32(dtype, backend):
    """Half-precision features against the fp64 formula on the same values: fp32's tolerance."""
    for args in OP.samples("cpu", torch.float32):
        if OP.why_not(backend, "cpu", args) is not None:
            continue
        half = (args[0].to(dtype), *args[1:])
        widened = (half[0].float(), *args[1:])
        got = torch.ops.neulig_fast.neulig_loss.default(*half)
        working = neulig_loss_reference(*widened)
        oracle = neulig_loss_reference(*testing.cast(widened, torch.float64))
        for x, y, exact in zip(got, working, oracle, strict=True):
            assert x.dtype == torch.float32
            testing.assert_within_rule(x, y, exact, OP.terms(*args))


# -- closed forms ----------------------------------------------------------------------------------


def test_two_experts_pay_half_the_squared_difference():
    """N = 2: s = ±1/√2 whatever the experts, so L_a = mean (w_1 - w_2)² / (2 λ)."""
    theta = torch.randn(2, 50, dtype=torch.float64)
    penalty = alignment_penalty("offset_sum", OffsetStats(*(x[0] for x in offset_gram(theta))))
    z, w = torch.randn(6, 2, 3, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    c, head = torch.zeros(2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    out = neulig_loss(z, w, c, head, None, torch.zeros(6).long(), penalty.matrix, scaling=7.0)
    expected = (out.coopvec[:, 0] - out.coopvec[:, 1]).square().mean() / (2 * 7.0)
    assert near(out.alignment, expected)


def test_uniform_coopvecs_cost_nothing_in_the_sum_form_and_the_gram_form():
    theta = torch.randn(4, 60, dtype=torch.float64)
    stats = OffsetStats(*(x[0] for x in offset_gram(theta)))
    z, head = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    zeros = torch.zeros(4, 12, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for form in ("offset_sum", "gram"):
        matrix = alignment_penalty(form, stats).matrix
        out = neulig_loss(z, *zeros, head, None, torch.zeros(5).long(), matrix)
        assert near(out.coopvec, torch.full((5, 4), 0.25, dtype=torch.float64))
        assert abs(float(out.alignment)) < EXACT
        assert float(matrix.abs().max()) > 0.1


def test_permuting_the_experts_permutes_the_coopvec_and_leaves_the_loss():
    torch.manual_seed(2)
    order = torch.tensor([2, 0, 3, 1])
    z, w = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(4, 4, 3, dtype=torch.float64)
    c, head = torch.randn(4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    a, t = torch.randn(4, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 4])
    one = neulig_loss(z, w.flatten(1), c, head, None, t, a)
    other = neulig_loss(
        z[:, order], w[order][:, order].flatten(1), c[order], head, None, t, a[order][:, order]
    )
    assert near(other.coopvec, one.coopvec[:, order])
    for x, y in zip(one[:3], other[:3], strict=True):
        assert near(x, y)


def test_one_class_has_no_boosting_loss():
    args = list(next(OP.samples("cpu", torch.float64)))
    out = neulig_loss(*args[:3], args[3][:1], None, torch.zeros(4).long(), args[6])
    assert float(out.boosting) == 0.0


def test_features_of_length_zero_have_no_direction():
    given = {**arguments(), "features": torch.zeros(4, 3, 5), "portland_bias": torch.zeros(3)}
    found = neulig_loss(**given)
    apart = neulig_loss(**given, normalize=False)
    assert found.loss.isnan() and found.boosting.isnan() and found.alignment.isfinite()
    torch.testing.assert_close(found.coopvec, torch.full((4, 3), 1 / 3))
    expected = -given["head_bias"].log_softmax(0)[given["targets"]].mean()
    torch.testing.assert_close(apart.boosting, expected)


# -- errors ----------------------------------------------------------------------------------------


def arguments():
    return {
        "features": torch.randn(4, 3, 5),
        "portland_weight": torch.randn(3, 15),
        "portland_bias": torch.randn(3),
        "head_weight": torch.randn(6, 5),
        "head_bias": torch.randn(6),
        "targets": torch.tensor([0, 1, 2, 5]),
        "alignment": torch.eye(3),
    }


@pytest.mark.parametrize(
    "change, message",
    [
        ({"features": torch.randn(4, 15)}, r"features must be \(B, N, D\)"),
        ({"features": torch.randn(0, 3, 5)}, r"features must be .* with no size zero, got \(0, 3"),
        ({"portland_weight": torch.randn(3, 15).to_sparse()}, "portland_weight must be dense"),
        (
            {"portland_weight": torch.randn(3, 14)},
            r"portland_weight .* = \(3, 15\), got \(3, 14\)",
        ),
        ({"portland_bias": torch.randn(2)}, r"portland_bias must be \(N,\) = \(3,\)"),
        ({"head_weight": torch.randn(6, 4)}, r"head_weight .* = \(6, 5\), got \(6, 4\)"),
        ({"head_bias": torch.randn(5)}, r"head_bias must be \(C,\) = \(6,\)"),
        ({"targets": None}, "targets are needed"),
        ({"targets": torch.zeros(4)}, "targets must be int64"),
        ({"targets": torch.zeros(3).long()}, r"targets must be \(B,\) = \(4,\)"),
        ({"targets": torch.tensor([0, 1, 2, 6])}, r"targets .* \[0, 6\), got \[6\]"),
        ({"targets": torch.tensor([0, 1, 2, -1])}, r"targets .* \[0, 6\), got \[-1\]"),
        ({"targets": torch.tensor([0, 1, 2, -100])}, r"targets .* \[0, 6\), got \[-100\]"),
        ({"targets": torch.tensor([0, 6, -1, 9])}, r"targets .* \[0, 6\), got \[-1, 6, 9\]"),
        ({"alignment": torch.eye(2)}, r"alignment must be \(N, N\) = \(3, 3\)"),
        ({"boosting": "semi"}, "boosting must be one of supervised, entropy"),
        ({"scaling": 0.0}, "scaling must be positive"),
        ({"portland_bias": torch.zeros(3).long()}, "portland_bias must be a float tensor"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    with pytest.raises(ValueError, match=f"neulig_loss: .*{message}"):
        neulig_loss(**{**arguments(), **change})


def test_what_is_no_tensor_is_named():
    for change in ({"features": [1.0]}, {"head_bias": 0.0}, {"alignment": None}):
        (name,) = change
        with pytest.raises(TypeError, match=f"neulig_loss: {name} must be a tensor, got"):
            neulig_loss(**{**arguments(), **change})


def test_all_faults_come_in_one_error():
    bad = {**arguments(), "portland_bias": torch.randn(2), "alignment": torch.eye(4)}
    with pytest.raises(ValueError, match=r"2 problems(.|\n)*portland_bias(.|\n)*alignment"):
        neulig_loss(**bad)


def test_entropy_neither_needs_nor_reads_targets():
    given = {**arguments(), "targets": torch.tensor([-5, 0, 99, 1])}
    assert torch.equal(
        neulig_loss(**given, boosting="entropy").loss,
        neulig_loss(**{**given, "targets": None}, boosting="entropy").loss,
    )

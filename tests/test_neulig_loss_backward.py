"""neulig_loss_backward beyond test_house.py: against autograd, and what is not asked for."""

import pytest
import torch
from torch.nn import functional

import neulig_fast
from neulig_fast import testing
from neulig_fast.ops.neulig_loss import OP as FORWARD
from neulig_fast.ops.neulig_loss_backward import OP

OUTPUTS = ("loss", "boosting", "alignment", "coopvec")
SLOTS = (0, 1, 2, 3, 4, 6)  # of the forward's float inputs
BACKENDS = [b for b in ("torch", "cpu") if OP.why_not(b, "cpu") is None]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    """Every test of this file runs on every backend."""
    with neulig_fast.use_backend(neulig_loss=request.param, neulig_loss_backward=request.param):
        yield request.param


def naive(z, w, c, head, bias, t, a, boosting, scaling, normalize, centered):
    """The loss once more, one sample at a time, so that autograd can be the oracle."""
    rows, terms = [], []
    for b in range(z.shape[0]):
        rows.append(functional.softmax(w @ z[b].reshape(-1) + c, 0))
        e = sum(rows[b][i] * z[b, i] for i in range(z.shape[1]))
        y = head @ (e / e.square().sum().sqrt() if normalize else e)
        y = y if bias is None else y + bias
        p = functional.softmax(y, 0)
        terms.append(-p[t[b]].log() if boosting == "supervised" else -(p * (p + 1e-6).log()).sum())
    coopvec = torch.stack(rows)
    v = coopvec - coopvec.mean(0) if centered else coopvec
    alignment = sum(x @ a @ x for x in v) / (scaling * len(v))
    boost = sum(terms) / len(terms)
    return boost + alignment, boost, alignment, coopvec


@pytest.mark.parametrize("used", OUTPUTS)
def test_each_outputs_gradient_alone_is_that_of_autograd(used, backend):
    """The three other incoming gradients are None: exactly one output is used."""
    k = OUTPUTS.index(used)
    for args in FORWARD.samples("cpu", torch.float64):
        if FORWARD.why_not(backend, "cpu", args) is not None:
            continue
        inputs = [
            None if x is None else x.clone().requires_grad_() for x in map(args.__getitem__, SLOTS)
        ]
        full = list(args)
        for slot, x in zip(SLOTS, inputs, strict=True):
            full[slot] = x
        seed = torch.randn_like(naive(*args)[k])
        tracked = [x for x in inputs if x is not None]
        expected = torch.autograd.grad(naive(*full)[k], tracked, seed, materialize_grads=True)
        got = torch.autograd.grad(
            torch.ops.neulig_fast.neulig_loss.default(*full)[k], tracked, seed
        )
        # All gradients of a sample are judged at one scale: some of them cancel to nearly nothing.
        got, expected = (torch.cat([x.flatten() for x in some]) for some in (got, expected))
        testing.assert_within_rule(got, expected, expected, FORWARD.terms(*args))


def test_gradients_that_are_not_needed_are_empty():
    *args, _ = next(OP.samples("cpu", torch.float32))
    everything = torch.ops.neulig_fast.neulig_loss_backward.default(*args, [True] * 6)
    some = torch.ops.neulig_fast.neulig_loss_backward.default(*args, [False, True] * 3)
    assert [x.numel() for x in some[::2]] == [0, 0, 0]
    assert all(torch.equal(x, y) for x, y in zip(some[1::2], everything[1::2], strict=True))


def test_the_gradient_of_the_logits_has_no_component_along_the_ones():
    """softmax ignores a shift of all logits, so the gradient of the bias sums to zero."""
    for args in OP.samples("cpu", torch.float64):
        gradients = torch.ops.neulig_fast.neulig_loss_backward.default(*args)
        scale = max(float(x.abs().max()) for x in gradients if x.numel())
        shifted = gradients[2].sum()[None] + scale
        exact = torch.full_like(shifted, scale)
        testing.assert_within_rule(shifted, exact, exact, OP.terms(*args))

"""Replay: the same results with and without a recording, and what makes it record anew."""

import pytest
import torch

import neulig_fast as nf
from neulig_fast.encoders import Replay

on_cuda = pytest.mark.skipif("not torch.cuda.is_available()", reason="no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=on_cuda)]


def net(seed):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 12), torch.nn.ReLU(), torch.nn.Linear(12, 5))


def pool_on(device):
    return nf.ExpertPool([net(s) for s in range(3)], net(0), device=device)


def draw(*shape, device):
    return torch.randn(*shape).to(device)


def recording(forward):
    return forward._recording


@pytest.mark.parametrize("device", DEVICES)
def test_both_forward_passes_are_what_they_are_without_it(device):
    pool = pool_on(device)
    experts, mixture = Replay(pool, nf.expert_forward), Replay(pool, nf.mixture_forward)
    for count in (4, 4, 4, 6, 4, 4, 6, 6, 6):
        x, w = draw(count, 7, device=device), draw(count, 3, device=device)
        torch.testing.assert_close(experts(x), nf.expert_forward(pool, x))
        torch.testing.assert_close(mixture(x, w), nf.mixture_forward(pool, x, w))
    assert (recording(experts) is not None) == (device == "cuda")


def test_arguments_are_checked():
    with pytest.raises(TypeError, match="pool must be an ExpertPool, got Sequential"):
        Replay(net(0), nf.expert_forward)
    forward = Replay(pool_on("cpu"), nf.mixture_forward)
    with pytest.raises(TypeError, match="argument 1 must be a tensor, got list"):
        forward(draw(4, 7, device="cpu"), [1.0])
    with pytest.raises(ValueError, match="coef must be"):
        forward(draw(4, 7, device="cpu"), draw(4, 2, device="cpu"))


@on_cuda
def test_results_on_cuda_are_the_callers_own():
    forward = Replay(pool := pool_on("cuda"), nf.expert_forward)
    batches = [draw(4, 7, device="cuda") for _ in range(5)]
    results = [forward(x) for x in batches]
    for x, result in zip(batches, results, strict=True):
        torch.testing.assert_close(result, nf.expert_forward(pool, x))


@on_cuda
def test_weights_changed_in_place_count_on_cuda():
    forward = Replay(pool := pool_on("cuda"), nf.expert_forward)
    x = draw(4, 7, device="cuda")
    for _ in range(3):
        forward(x)
    pool.params.mul_(1.5)
    torch.testing.assert_close(forward(x), nf.expert_forward(pool, x))


@on_cuda
def test_a_forced_backend_is_recorded_anew_on_cuda():
    forward = Replay(pool_on("cuda"), nf.expert_forward)
    x = draw(4, 7, device="cuda")
    for _ in range(3):
        forward(x)
    before = recording(forward)
    with nf.use_backend(expert_linear="torch"):
        for _ in range(3):
            forward(x)
        assert recording(forward) is not before
    forward.clear()
    assert recording(forward) is None


@on_cuda
def test_a_pass_that_waits_for_the_gpu_is_said_and_runs_on_cuda():
    def waiting(pool, x):
        features = nf.expert_forward(pool, x)
        return features if features.isfinite().all() else -features

    forward = Replay(pool := pool_on("cuda"), waiting)
    x = draw(4, 7, device="cuda")
    forward(x)
    with pytest.warns(nf.NeuligFastWarning, match="cannot be recorded"):
        forward(x)
    torch.testing.assert_close(forward(x), nf.expert_forward(pool, x))

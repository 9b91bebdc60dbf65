"""BatchNorm policies against closed forms."""

import copy

import pytest
import torch
from torch import nn

from neulig_fast.neulig import batchnorm as bn
from neulig_fast.neulig.engine import NeuLig
from neulig_fast.neulig.heads import Head
from neulig_fast.pool import ExpertPool

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
CHANNELS = 4


class Net(nn.Module):
    """conv -> BatchNorm -> ReLU -> mean over positions: (B, 3, 5, 5) -> (B, CHANNELS)."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, CHANNELS, 3)
        self.norm = nn.BatchNorm2d(CHANNELS)

    def forward(self, images):
        return self.norm(self.conv(images)).relu().mean((2, 3))


def trained(updates):
    """An expert with statistics, scale and shift of its own after some training batches."""
    net = Net().double().train()
    nn.init.normal_(net.norm.weight, 1, 0.3)
    nn.init.normal_(net.norm.bias)
    for _ in range(updates):
        net(2 * torch.randn(8, 3, 5, 5, dtype=torch.float64) + 1)
    return net.eval()


@pytest.fixture
def pool():
    return ExpertPool([trained(updates) for updates in (2, 3, 5)])


@pytest.fixture
def engine(pool):
    heads = {"a": Head(torch.randn(3, CHANNELS, dtype=torch.float64))}
    return NeuLig(pool, heads)


def images(count=6):
    return torch.randn(count, 3, 5, 5, dtype=torch.float64) + 0.5


def weights(*shape):
    return torch.softmax(torch.randn(*shape, 3, dtype=torch.float64), -1)


def stats(pool, i):
    state = pool.state_dict(i)
    return state["norm.running_mean"], state["norm.running_var"]


def test_blend_is_linear_and_integers_come_from_the_first_expert(pool):
    w = weights()
    state = bn.merged_state_dict(pool, w)
    mean = sum(w[i] * stats(pool, i)[0] for i in range(3))
    variance = sum(w[i] * stats(pool, i)[1] for i in range(3))
    torch.testing.assert_close(state["norm.running_mean"], mean, **CLOSE)
    torch.testing.assert_close(state["norm.running_var"], variance, **CLOSE)
    assert int(state["norm.num_batches_tracked"]) == 2


def test_a_merged_model_owns_its_integers(pool):
    state = bn.merged_state_dict(pool, weights())
    state["norm.num_batches_tracked"].add_(5)
    assert int(pool.state_dict(0)["norm.num_batches_tracked"]) == 2


@pytest.mark.parametrize("policy", bn.POLICIES)
def test_hard_is_the_expert_under_every_policy(engine, policy):
    x, picked = images(), torch.tensor([0.1, 0.8, 0.1], dtype=torch.float64)
    expert = engine.heads["a"](engine.features(x)[:, 1])
    logits = engine.merged_forward(x, "a", "hard", weights=picked, batchnorm=policy)
    torch.testing.assert_close(logits, expert, **CLOSE)
    merged = engine.merge("hard", weights=picked, batchnorm=policy)
    state = engine.pool.state_dict(1)
    assert all(torch.equal(tensor, state[name]) for name, tensor in merged.items())


def test_mixture_moments_are_the_formula(pool):
    w = weights()
    state = bn.merged_state_dict(pool, w, "mixture_moments")
    mean = sum(w[i] * stats(pool, i)[0] for i in range(3))
    second = sum(w[i] * (stats(pool, i)[1] + stats(pool, i)[0] ** 2) for i in range(3))
    torch.testing.assert_close(state["norm.running_mean"], mean, **CLOSE)
    torch.testing.assert_close(state["norm.running_var"], second - mean**2, **CLOSE)


def test_mixture_moments_are_those_of_pooled_samples():
    experts, samples = [Net().double() for _ in range(3)], []
    for k, expert in enumerate(experts):
        samples.append((k + 1) * torch.randn(40, CHANNELS, dtype=torch.float64) + 3 * k)
        expert.norm.running_mean.copy_(samples[-1].mean(0))
        expert.norm.running_var.copy_(samples[-1].var(0, correction=0))
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    state = bn.merged_state_dict(ExpertPool(experts), third, "mixture_moments")
    pooled = torch.cat(samples)
    torch.testing.assert_close(state["norm.running_mean"], pooled.mean(0), **CLOSE)
    torch.testing.assert_close(state["norm.running_var"], pooled.var(0, correction=0), **CLOSE)


def test_mixture_moments_at_one_hot_weights_are_the_expert(pool):
    one_hot = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    merged, expert = bn.merged_state_dict(pool, one_hot, "mixture_moments"), pool.state_dict(1)
    for name in ("norm.running_mean", "norm.running_var", "norm.weight", "conv.weight"):
        assert torch.equal(merged[name], expert[name])


def test_mixture_moments_per_sample(engine):
    x, w = images(5), weights(5)
    logits = engine.merged_forward(x, "a", weights=w, batchnorm="mixture_moments", chunk=2)
    one_by_one = [
        engine.merged_forward(image[None], "a", "dataset", weights=v, batchnorm="mixture_moments")
        for image, v in zip(x, w, strict=True)
    ]
    torch.testing.assert_close(logits, torch.cat(one_by_one), **CLOSE)
    blended = engine.merged_forward(x, "a", weights=w, batchnorm="blend")
    assert not torch.allclose(logits, blended)


def conv_moments(pool, state, x):
    """What the first (and only) BatchNorm of the merged network sees."""
    seen = nn.functional.conv2d(x, state["conv.weight"], state["conv.bias"])
    return seen.mean((0, 2, 3)), seen.var((0, 2, 3), correction=1)


def test_re_estimation_measures_the_merged_network(pool):
    x, w = images(8), weights()
    state = bn.merged_state_dict(pool, w, "re_estimate", [(x, None)])
    mean, variance = conv_moments(pool, state, x)
    torch.testing.assert_close(state["norm.running_mean"], mean, **CLOSE)
    torch.testing.assert_close(state["norm.running_var"], variance, **CLOSE)
    assert int(state["norm.num_batches_tracked"]) == 1


def test_re_estimation_counts_batches_by_their_size(pool):
    x, w = images(11), weights()
    parts = list(x.split(4))  # 4, 4 and 3 images
    state = bn.merged_state_dict(pool, w, "re_estimate", parts)
    moments = [conv_moments(pool, state, part) for part in parts]
    shares = [len(part) / 11 for part in parts]
    for k, name in enumerate(("norm.running_mean", "norm.running_var")):
        expected = sum(s * m[k] for s, m in zip(shares, moments, strict=True))
        torch.testing.assert_close(state[name], expected, **CLOSE)
    reverse = bn.merged_state_dict(pool, w, "re_estimate", parts[::-1])
    for name, tensor in state.items():
        torch.testing.assert_close(reverse[name], tensor, **CLOSE)


@pytest.mark.parametrize("policy", ["re_estimate", "batch_statistics"])
def test_all_but_batchnorm_is_in_eval_mode(engine, policy):
    x = images()
    options = {"batchnorm": policy, "calibration": [x]}
    expected = engine.merged_forward(x, "a", "uniform", **options)
    template = engine.pool.template
    template.conv = nn.Sequential(nn.Dropout(0.5), template.conv)  # other keys: "conv.1.weight"
    states = [
        {name.replace("conv.", "conv.1."): t for name, t in engine.pool.state_dict(i).items()}
        for i in range(3)
    ]
    dropping = NeuLig(ExpertPool(states, template.train()), engine.heads)
    logits = dropping.merged_forward(x, "a", "uniform", **options)
    torch.testing.assert_close(logits, expected, **CLOSE)
    assert all(module.training for module in template.modules())


@pytest.mark.parametrize("policy", ["re_estimate", "batch_statistics"])
def test_nothing_of_the_experts_or_the_template_changes(engine, policy):
    pool = engine.pool
    modules = {name: copy.copy(vars(m)) for name, m in pool.template.named_modules()}
    before, counter = pool.params.clone(), pool.state_dict(0)["norm.num_batches_tracked"].clone()
    values = {name: tensor.clone() for name, tensor in pool.template.state_dict().items()}
    engine.merged_forward(images(), "a", "uniform", batchnorm=policy, calibration=[images()])
    assert torch.equal(pool.params, before)
    assert torch.equal(pool.state_dict(0)["norm.num_batches_tracked"], counter)
    for name, tensor in pool.template.state_dict().items():
        assert torch.equal(tensor, values[name])
    for name, module in pool.template.named_modules():
        for key in ("training", "momentum", "track_running_stats"):
            assert vars(module).get(key) == modules[name].get(key)


def test_the_template_is_restored_when_calibration_fails(engine):
    def broken():
        yield images()
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="on fire"):
        engine.merge("uniform", loader=broken(), batchnorm="re_estimate")
    assert not any(module.training for module in engine.pool.template.modules())
    assert engine.pool.template.norm.momentum == 0.1


def test_batch_statistics_are_the_batches_own(engine):
    x, w = images(7), weights()
    logits = engine.merged_forward(x, "a", "dataset", weights=w, batchnorm="batch_statistics")
    module = Net().double().train()
    module.load_state_dict(engine.pool.blend(w))
    with torch.no_grad():
        expected = engine.heads["a"](module(x))
    torch.testing.assert_close(logits, expected, **CLOSE)


def test_models_without_batchnorm_are_the_same_under_every_policy():
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(75, CHANNELS)).double() for _ in range(3)]
    engine = NeuLig(ExpertPool(experts), {"a": Head(torch.randn(3, CHANNELS).double())})
    x, w = images(4), weights(4)
    for mode, given in (("per_sample", w), ("batch_mean", w), ("dataset", w[0])):
        outputs = [
            engine.merged_forward(x, "a", mode, weights=given, batchnorm=policy)
            for policy in bn.POLICIES
        ]
        for other in outputs[1:]:
            assert torch.equal(other, outputs[0])


@pytest.mark.parametrize("policy", ["re_estimate", "batch_statistics"])
def test_per_sample_statistics_are_refused(engine, policy):
    with pytest.raises(ValueError, match="impossible per sample"):
        engine.merged_forward(images(), "a", batchnorm=policy, calibration=[images()])


def test_re_estimation_without_images_is_refused(engine):
    with pytest.raises(ValueError, match="calibration="):
        engine.merged_forward(images(), "a", "uniform", batchnorm="re_estimate")
    with pytest.raises(ValueError, match="no images"):
        engine.merge("uniform", loader=[], batchnorm="re_estimate")


def test_policies_beyond_blend_need_the_template(pool):
    states = ExpertPool([pool.state_dict(i) for i in range(3)])
    bn.merged_state_dict(states, weights())
    with pytest.raises(ValueError, match="template"):
        bn.merged_state_dict(states, weights(), "mixture_moments")

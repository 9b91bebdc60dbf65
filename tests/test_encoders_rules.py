"""What the rules of encoders refuse, how a rule is added, and the slow way where there is none."""

import copy
import functools
import logging
import re
import sys
from pathlib import Path

import open_clip.modified_resnet as clip_resnet
import open_clip.transformer as clip
import pytest
import timm
import torch
from timm.layers.patch_embed import PatchEmbed
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import neulig_fast as nf
from neulig_fast import encoders
from neulig_fast.encoders import rules
from neulig_fast.neulig.merged import per_sample_features

EXACT = {"rtol": 1e-9, "atol": 1e-9}
N, D = 3, 8


def pool_of(build):
    return nf.ExpertPool([build().double() for _ in range(N)])


def images_for(count):
    return torch.randn(count, 3, 4, 4, dtype=torch.float64)


def weights_for(count):
    return torch.softmax(torch.randn(count, N, dtype=torch.float64), 1)


def mlp(*layers):
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 6), *layers, nn.Linear(6, D))


class Gated(nn.Module):
    """What no rule knows."""

    def __init__(self):
        super().__init__()
        self.gate, self.value = nn.Linear(6, 6), nn.Linear(6, 6)
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x):
        return self.gate(x).sigmoid() * self.value(x) + self.bias


class GatedChild(Gated):
    """Inherits from what a rule may know, and computes something else."""

    def forward(self, x):
        return -super().forward(x)


def separately(pool, images):
    module, results = copy.deepcopy(pool.template).eval(), []
    for i in range(N):
        module.load_state_dict(pool.state_dict(i))
        with torch.no_grad():
            results.append(module(images))
    return torch.stack(results)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))


def gated_rule(run, module, path, x):
    gate = run.child(module, path, "gate", x)
    value = run.child(module, path, "value", x)
    return run.add(gate.sigmoid() * value, *run.stacks(module, path, "bias"))


# -- rules of one's own ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Gated, f"{__name__}.Gated"], ids=["class", "name"])
def test_a_registered_rule_runs(table, kind):
    pool, images, coef = pool_of(lambda: mlp(Gated())), images_for(4), weights_for(4)
    assert encoders.register(kind)(gated_rule) is gated_rule
    torch.testing.assert_close(nf.expert_forward(pool, images), separately(pool, images), **EXACT)
    slow = encoders.torch_func.mixture_features(pool, pool.template, images, coef)
    torch.testing.assert_close(nf.mixture_forward(pool, images, coef), slow, **EXACT)


def test_a_rule_is_for_the_exact_type(table):
    encoders.register(Gated)(gated_rule)
    with pytest.raises(ValueError, match=r"2 is a .*GatedChild, which has no rule"):
        nf.expert_forward(pool_of(lambda: mlp(GatedChild())), images_for(1))


def test_a_type_has_one_rule(table):
    encoders.register(Gated)(gated_rule)
    with pytest.raises(ValueError, match=r"register: <class .*Gated'> has a rule already"):
        encoders.register(Gated)(gated_rule)


def test_a_rule_says_what_it_does_not_cover(table):
    encoders.register(Gated, why_not=lambda module: "it is Tuesday")(gated_rule)
    with pytest.raises(ValueError, match=r"2 is a .*Gated that the rule does not cover: it is Tue"):
        nf.expert_forward(pool_of(lambda: mlp(Gated())), images_for(1))


def test_parameters_before_any_layer_and_none_at_all(table):
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.by, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(()))

        def forward(self, x):
            return (x * self.scale + self.by).flatten(1)

    @encoders.register(Shift)
    def shift(run, module, path, x):
        by, scale = run.stacks(module, path, "by", "scale")
        return run.add(run.scale(x, scale), by).flatten(1)

    images, coef = images_for(4), weights_for(4)
    for build in (Shift, lambda: nn.Sequential(nn.BatchNorm2d(3), Shift())):
        pool = pool_of(build)
        expected = separately(pool, images)
        torch.testing.assert_close(nf.expert_forward(pool, images), expected, **EXACT)
    linear_in_theta = pool_of(lambda: nn.Sequential(nn.Flatten(), nn.Linear(48, D)))
    expected = (coef.T[..., None] * separately(linear_in_theta, images)).sum(0)
    torch.testing.assert_close(nf.mixture_forward(linear_in_theta, images, coef), expected, **EXACT)
    pool = pool_of(lambda: nn.Sequential(nn.Identity(), nn.Linear(4, 4), nn.Flatten()))
    torch.testing.assert_close(nf.expert_forward(pool, images), separately(pool, images), **EXACT)


# -- what is refused ------------------------------------------------------------------------------


def hooked():
    module = mlp()
    module[1].register_forward_hook(lambda *args: None)
    module[2].register_forward_pre_hook(lambda *args: None)
    return module


def hooked_backwards():
    module = mlp()
    module[1].register_full_backward_hook(lambda *args: None)
    module[2].register_full_backward_pre_hook(lambda *args: None)
    return module


def patched():
    module = mlp(nn.Tanh())
    module[2].forward = torch.sin
    return module


def crossing():
    return clip.ResidualAttentionBlock(8, 2, is_cross_attention=True)


def clip_tower(**settings):
    return clip.VisionTransformer(4, 2, 16, 1, 2, 2, output_dim=D, **settings)


def timm_tower(**settings):
    return timm.models.VisionTransformer(
        4, 2, embed_dim=16, depth=1, num_heads=2, num_classes=D, **settings
    )


def loose_timm_tower():
    return timm_tower(embed_layer=functools.partial(PatchEmbed, strict_img_size=False))


def cnn():
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.Flatten())


def one_channel():
    return nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(3, 4, 3), nn.Flatten())


def flat_norm():
    return nn.Sequential(nn.BatchNorm1d(3), nn.Flatten())


REFUSED = {
    "type": (
        lambda: mlp(Gated(), nn.Softmax(1)),
        ["2 is a .*Gated, which", "3 .*Softmax, which"],
    ),
    "root": (Gated, ["the template is a .*Gated, which has no rule"]),
    "hooks": (hooked, ["1 has forward hooks", "2 has forward hooks"]),
    "backward": (hooked_backwards, ["1 has backward hooks", "2 has backward hooks"]),
    "patched": (patched, ["2 has a forward of its own"]),
    "statistics": (
        lambda: mlp(nn.BatchNorm1d(6, track_running_stats=False)),
        ["2 .*BatchNorm1d .*track_running_stats=False"],
    ),
    "norm": (lambda: nn.Sequential(nn.LayerNorm((4, 4))), ["0 .*has several dimensions"]),
    "flatten": (lambda: mlp(nn.Flatten(0)), ["2 .*start_dim=0"]),
    "indices": (lambda: mlp(nn.MaxPool1d(2, return_indices=True)), ["return_indices=True"]),
    "attention": (
        lambda: nn.Sequential(nn.MultiheadAttention(8, 2, add_bias_kv=True)),
        ["add_bias_kv=True"],
    ),
    "zero": (lambda: nn.Sequential(nn.MultiheadAttention(8, 2, add_zero_attn=True)), ["zero_attn"]),
    "cross": (crossing, ["is_cross_attention=True"]),
    "cosine": (lambda: clip.Attention(8, 2, scaled_cosine=True), ["scaled_cosine=True"]),
    "none": (lambda: clip_tower(pool_type="none"), ["pooling 'none'.* several vectors"]),
    "parallel": (
        lambda: clip_tower(attentional_pool="parallel", attn_pooler_heads=2),
        ["pooling 'parallel'.* several vectors"],
    ),
    "timm-pool": (lambda: timm_tower(global_pool=""), ["global_pool=''"]),
    "timm-prr": (lambda: timm_tower(global_pool="prr"), ["AttentionPoolPrr, which has no rule"]),
    "timm-size": (lambda: timm_tower(dynamic_img_size=True), ["dynamic_img_size=True"]),
    "timm-pad": (lambda: timm_tower(dynamic_img_pad=True), ["dynamic_img_pad=True"]),
    "timm-pooler": (
        lambda: timm.layers.AttentionPoolLatent(8, pool_type=""),
        ["AttentionPoolLatent .*pool_type=''"],
    ),
}


@pytest.mark.parametrize("build, messages", REFUSED.values(), ids=REFUSED)
def test_what_no_rule_covers_is_named(build, messages):
    pool = pool_of(build)
    for call in (
        lambda: nf.expert_forward(pool, images_for(2)),
        lambda: nf.mixture_forward(pool, images_for(2), weights_for(2)),
    ):
        with pytest.raises(ValueError, match="no rule covers this template") as caught:
            call()
        for message in (*messages, "neulig_fast.encoders.register", "fallback='torch.func'"):
            caught.match(message)


def test_the_children_of_an_unknown_module_are_its_own_business():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Gated()

    assert len(encoders.faults(mlp(Own()))) == 1
    assert len(encoders.faults(nn.Sequential(FrozenBatchNorm2d(3), nn.ReLU()))) == 1
    assert not encoders.faults(clip_resnet.ModifiedResNet([1, 1, 1, 1], D, 4, 32, 8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coef": torch.ones(3, N)}, r"coef must be .*\(2, 3\) or \(N,\) = \(3,\), got \(3, 3\)"),
        ({"coef": torch.ones(N + 1)}, r"coef must be .*got \(4,\)"),
        ({"coef": torch.ones(1, 2, N)}, r"coef must be .*got \(1, 2, 3\)"),
        ({"coef": torch.ones(2, N).long()}, r"coef must be a float tensor .*torch.int64"),
        ({"batchnorm": "mixture_moment"}, "got 'mixture_moment'; did you mean 'mixture_moments'?"),
        ({"batchnorm": "re_estimate"}, "batchnorm must be one of blend, mixture_moments"),
        ({"fallback": "vmap"}, "fallback must be None or 'torch.func', got 'vmap'"),
        ({"images": torch.ones(())}, r"images must be a batch \(B, ...\), got \(\)"),
        ({"images": torch.ones(2, 5)}, r"1: inputs must be \(B, ..., 48\), got \(2, 5\)"),
    ],
)
def test_arguments_that_do_not_fit(options, message):
    pool = pool_of(mlp)
    arguments = {"images": images_for(2), "coef": weights_for(2), **options}
    with pytest.raises(ValueError, match=message):
        nf.mixture_forward(pool, **arguments)
    if {"fallback", "images"} & options.keys():
        with pytest.raises(ValueError, match=message):
            nf.expert_forward(pool, arguments["images"], fallback=arguments.get("fallback"))


def test_all_that_is_wrong_is_said_at_once():
    pool = nf.ExpertPool([mlp().state_dict()])
    with pytest.raises(ValueError, match="4 problems") as caught:
        nf.mixture_forward(pool, torch.ones(2, 48), torch.ones(5), batchnorm="a", fallback="b")
    for name in ("coef", "batchnorm", "fallback", "no template module to run"):
        caught.match(name)
    with pytest.raises(ValueError, match=r"expert_forward: .*give ExpertPool a template="):
        nf.expert_forward(pool, torch.ones(2, 48))
    for call in (
        lambda: nf.expert_forward(pool, [1.0]),
        lambda: nf.mixture_forward(pool, [1.0], torch.ones(1)),
        lambda: nf.mixture_forward(pool, torch.ones(2, 48), [1.0]),
    ):
        with pytest.raises(TypeError, match="must be a tensor, got list"):
            call()


def test_a_pool_is_asked_for():
    for call in (
        lambda: nf.expert_forward([mlp()], images_for(2)),
        lambda: nf.mixture_forward([mlp()], images_for(2), weights_for(2)),
    ):
        with pytest.raises(TypeError, match="_forward: pool must be an ExpertPool, got list"):
            call()


@pytest.mark.parametrize(
    ("build", "images", "message"),
    [
        (clip_tower, torch.ones(2, 1, 4, 4), r"conv1: inputs must be \(B, 3, H, W\)"),
        (clip_tower, torch.ones(2, 3, 4), r"conv1: inputs must be \(B, 3, H, W\)"),
        (clip_tower, torch.ones(2, 3, 6, 6), r"\(5, 16\) meet .*\(10, 16\).* of another size"),
        (timm_tower, torch.ones(2, 3, 6, 6), r"patch_embed: images must be 4 x 4, got 6 x 6"),
        (timm_tower, torch.ones(2, 3, 5, 5), r"patch_embed: images must be 4 x 4, got 5 x 5"),
        (
            loose_timm_tower,
            torch.ones(2, 3, 4, 5),
            "must be of whole 2 x 2 patches, got 4 x 5",
        ),
        (loose_timm_tower, torch.ones(2, 3, 6, 6), r"\(5, 16\) meet .*\(10, 16\).* of another si"),
        (cnn, torch.ones(2, 3, 2, 9), r"1: images of 2 x 9 pixels do not hold a kernel of 3 x 3"),
        (cnn, torch.ones(2, 1, 4, 4), r"0: inputs must be \(B, 3, H, W\), got \(2, 1, 4, 4\)"),
        (cnn, torch.ones(2, 3, 4), r"0: inputs must be \(B, 3, H, W\), got \(2, 3, 4\)"),
        (
            one_channel,
            torch.ones(2, 3, 4, 4),
            r"0: inputs must be \(B, 1, H, W\), got \(2, 3",
        ),
        (
            flat_norm,
            torch.ones(2, 3, 4, 4),
            r"0: .* \(B, 3\) or \(B, 3, L\), got \(2, 3, 4, 4",
        ),
        (
            flat_norm,
            torch.ones(2, 1, 4),
            r"0: .* \(B, 3\) or \(B, 3, L\), got \(2, 1, 4\)",
        ),
        (cnn, torch.ones(2, 3, 4, 4).byte(), "0: inputs must be floating point, got torch.uint8"),
        (mlp, torch.ones(2, 3, 4, 4).long(), "1: inputs must be floating point, got torch.int64"),
        (clip_tower, torch.ones(2, 3, 4, 4).byte(), "conv1: inputs must be floating point, got"),
        (lambda: nn.Sequential(nn.Linear(4, 4)), torch.ones(2, 3, 4), r"to \(2, D\), got \(2, 3,"),
    ],
)
def test_images_of_another_size(build, images, message):
    pool = pool_of(build)
    for call in (
        lambda: nf.expert_forward(pool, images),
        lambda: nf.mixture_forward(pool, images, weights_for(2)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# -- the slow way ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_the_fallback_runs_what_no_rule_covers(batch):
    pool, images, coef = pool_of(lambda: mlp(Gated())), images_for(batch), weights_for(batch)
    features = nf.expert_forward(pool, images, fallback="torch.func")
    torch.testing.assert_close(features, separately(pool, images), **EXACT)
    mixture = nf.mixture_forward(pool, images, coef, fallback="torch.func")
    assert mixture.shape == (batch, D)
    for b in range(batch):
        alone = nf.mixture_forward(pool, images[b : b + 1], coef[b])  # needs no rule
        torch.testing.assert_close(mixture[b], alone[0], **EXACT)


def test_the_fallback_says_why(caplog):
    pool = pool_of(lambda: mlp(Gated()))
    with caplog.at_level(logging.DEBUG, "neulig_fast.dispatch"):
        nf.expert_forward(pool, images_for(1), fallback="torch.func")
    assert "expert_forward: torch.func, because 2 is a " in caplog.text


def test_the_fallback_is_not_taken_where_rules_do(monkeypatch):
    monkeypatch.setattr(encoders.torch_func, "run", None)  # cannot be called
    pool, images, coef = pool_of(mlp), images_for(2), weights_for(2)
    nf.expert_forward(pool, images, fallback="torch.func")
    nf.mixture_forward(pool, images, coef, fallback="torch.func")
    per_sample_features(pool, images, coef)


def test_names_in_the_table_are_classes_of_the_installed_libraries():
    for kind in rules.RULES:
        assert isinstance(kind, str)
        module, _, name = kind.rpartition(".")
        __import__(module)
        assert issubclass(getattr(sys.modules[module], name), nn.Module), kind


def test_the_examples_of_the_docs_run_as_printed(monkeypatch, capsys):
    page = (Path(__file__).resolve().parents[1] / "docs/encoders.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert len(examples) == 3
    monkeypatch.setattr(rules, "RULES", dict(rules.RULES))  # one of them registers a rule
    exec("".join(examples), {"__name__": "examples"})
    assert capsys.readouterr().out.splitlines() == [
        "(2, 4, 512) (4, 512)",
        "(4, 512)",
        "(3, 5, 12)",
    ]

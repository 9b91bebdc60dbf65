"""expert_forward and mixture_forward: every architecture against its own modules, in fp64."""

import copy
import functools

import open_clip.modified_resnet as clip_resnet
import open_clip.transformer as clip
import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet as vision

import neulig_fast as nf
from neulig_fast import testing
from neulig_fast.encoders import faults
from neulig_fast.encoders.convolution import Geometry, windows

EXACT = {"rtol": 1e-9, "atol": 1e-9}  # float64 against float64, another order of operations
D, N = 8, 3


def tower(**settings):
    small = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "heads": 2}
    return clip.VisionTransformer(**{**small, "mlp_ratio": 2, "output_dim": D, **settings})


def timm_tower(**settings):
    small = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.models.VisionTransformer(**{**small, "num_classes": D, **settings})


def plain_cnn():
    act = nn.ReLU(inplace=True)  # the same module in several places
    return nn.Sequential(
        act,  # in place, on the caller's images
        nn.Conv2d(3, 6, (3, 5), stride=(2, 1), padding=(1, 2)),
        nn.BatchNorm2d(6),
        act,
        nn.Conv2d(6, 8, 3, padding="same", dilation=2, groups=2, bias=False),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, padding=1, padding_mode="circular"),
        nn.Sequential(nn.SiLU(inplace=True), nn.Dropout2d(0.5)),
        nn.Conv2d(12, 40, 3, padding=(1, 0), stride=2, dilation=(1, 2)),
        nn.BatchNorm2d(40, affine=False),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(160, 24, bias=False),
        nn.BatchNorm1d(24),
        nn.Hardtanh(),
        nn.LayerNorm(24, elementwise_affine=False),
        nn.Linear(24, D),
    )


def plain_mlp():
    return nn.Sequential(
        nn.Flatten(),
        nn.LayerNorm(3 * 16 * 16, bias=False),
        nn.Linear(3 * 16 * 16, 24),
        nn.GELU("tanh"),
        nn.Dropout(0.3),
        nn.Identity(),
        nn.Linear(24, 24),
        nn.ReLU(),
        nn.Linear(24, D),
    )


SCALED = {f"scale_{part}": True for part in ("heads", "attn_inner", "attn", "fc")}
CLIP = {
    "clip": {},
    "clip-quick": {"act_layer": clip.QuickGELU, "patch_size": 4, "mlp_ratio": 4.0},
    "clip-layer-scale": {"ls_init_value": 0.1, "no_ln_pre": True, "patch_dropout": 0.5},
    "clip-average": {"pool_type": "avg", "output_tokens": True},
    "clip-average-then-norm": {"pool_type": "avg", "final_ln_after_pool": True},
    "clip-attentional": {"attentional_pool": True, "attn_pooler_queries": 3, "width": 48},
    "clip-custom-blocks": {"qk_norm": True, **SCALED},
}
TIMM = {
    "timm": {},
    "timm-average": {"global_pool": "avg", "reg_tokens": 2, "no_embed_class": True},
    "timm-max": {"global_pool": "max", "class_token": False, "pos_embed": "none"},
    "timm-avgmax": {"global_pool": "avgmax", "pool_include_prefix": True, "fc_norm": False},
    "timm-map": {"global_pool": "map", "qk_norm": True, "scale_attn_norm": True},
    "timm-layers": {
        "init_values": 0.1,
        "pre_norm": True,
        "drop_path_rate": 0.2,
        "patch_drop_rate": 0.5,
        "scale_mlp_norm": True,
        "qkv_bias": False,
        "act_layer": "quick_gelu",
    },
}
BLOCKS = {"basic": vision.BasicBlock, "bottleneck": vision.Bottleneck}
ARCHITECTURES = {
    **{name: lambda s=s: tower(**s) for name, s in CLIP.items()},
    **{name: lambda s=s: timm_tower(**s) for name, s in TIMM.items()},
    "clip-resnet": lambda: clip_resnet.ModifiedResNet([2, 1, 1, 1], D, 4, 64, 8),
    "resnet-basic": lambda: vision.ResNet(vision.BasicBlock, [1, 2, 1, 1], D),
    "resnext": lambda: vision.ResNet(
        vision.Bottleneck, [1, 1, 1, 1], D, groups=4, width_per_group=8
    ),
    "cnn": plain_cnn,
    "mlp": plain_mlp,
}
SIZES = {"clip-resnet": (3, 64, 64), "resnet-basic": (3, 32, 32)}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


def expert(name):
    """Weights that make every layer matter."""
    module = ARCHITECTURES[name]()
    for key, tensor in module.state_dict().items():
        if key.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.2)
    return module.double()


@functools.cache
def pool_of(name, count=N):
    return nf.ExpertPool([expert(name) for _ in range(count)])


def images_for(name, count):
    return torch.randn(count, *SIZES.get(name, (3, 16, 16)), dtype=torch.float64)


def coefficients(count, experts=N):
    """Rows that do not sum to one, of either sign; positive enough for blended variances."""
    return torch.softmax(torch.randn(count, experts), 1).double() * torch.rand(count, 1).add(0.6)


def first(output):
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def one_by_one(pool, images, states):
    """(len(states), B, D): a module of its own, filled by ``load_state_dict``, for every state."""
    module = copy.deepcopy(pool.template).eval().to(pool.params.dtype)
    results = []
    for state in states:
        module.load_state_dict(state)
        results.append(first(module(images.clone())))  # it may write into them
    return torch.stack(results)


@torch.no_grad()
def merged_one_by_one(pool, images, coef):
    """(B, D): image b through a module that holds the blend with coefficients b."""
    rows = zip(images, coef, strict=True)
    return torch.cat([one_by_one(pool, x[None], [pool.blend(w)])[0] for x, w in rows])


# -- exactness ------------------------------------------------------------------------------------


@every_architecture
def test_experts_at_once_are_the_experts_one_by_one(name):
    pool, images = pool_of(name), images_for(name, 4)
    before = images.clone()
    states = [pool.state_dict(i) for i in range(N)]
    features = nf.expert_forward(pool, images)
    torch.testing.assert_close(features, one_by_one(pool, images, states), **EXACT)
    assert torch.equal(images, before)


@every_architecture
def test_a_mixture_is_the_separately_blended_models(name):
    pool, images, coef = pool_of(name), images_for(name, 4), coefficients(4)
    expected = merged_one_by_one(pool, images, coef)
    torch.testing.assert_close(nf.mixture_forward(pool, images, coef), expected, **EXACT)
    alone = [nf.mixture_forward(pool, images[b : b + 1], coef[b : b + 1]) for b in range(4)]
    torch.testing.assert_close(torch.cat(alone), expected, **EXACT)
    one = nf.mixture_forward(pool, images, coef[0])
    torch.testing.assert_close(one, one_by_one(pool, images, [pool.blend(coef[0])])[0], **EXACT)


def words():
    """Word indices instead of images."""
    return nn.Sequential(
        nn.Embedding(11, 12, padding_idx=0), nn.LayerNorm(12), nn.Flatten(), nn.Linear(60, D)
    )


def test_words_instead_of_images():
    pool = nf.ExpertPool([words().double() for _ in range(N)])
    indices, coef = torch.randint(11, (4, 5)), coefficients(4)
    indices[0, 0] = 0  # padding
    features = nf.expert_forward(pool, indices)
    states = [pool.state_dict(i) for i in range(N)]
    torch.testing.assert_close(features, one_by_one(pool, indices, states), **EXACT)
    expected = merged_one_by_one(pool, indices, coef)
    torch.testing.assert_close(nf.mixture_forward(pool, indices, coef), expected, **EXACT)


@pytest.mark.parametrize(
    "kernel, geometry",
    [
        ((1, 1), Geometry()),
        ((1, 1), Geometry(stride=(2, 3))),
        ((2, 2), Geometry(stride=(2, 2))),
        ((3, 2), Geometry(padding=(1, 2))),
        ((2, 3), Geometry(stride=(3, 1), padding=(2, 0), dilation=(2, 1))),
        ((7, 7), Geometry()),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_a_linear_layer_of_windows(kernel, geometry, memory_format):
    x = torch.randn(2, 3, 7, 8).double().to(memory_format=memory_format)
    weight = torch.randn(5, 3, *kernel).double()
    expected = nn.functional.conv2d(x, weight, None, *geometry)
    seen = windows(x, weight.shape[2:], geometry)
    torch.testing.assert_close((seen @ weight.flatten(1).T).permute(0, 3, 1, 2), expected, **EXACT)
    assert geometry.positions(x.shape[2:], weight.shape[2:]) == expected[0, 0].numel()
    if not geometry.overlap(weight.shape[2:]):
        assert seen[0].numel() <= x[0].numel()


@every_architecture
def test_one_hot_coefficients_give_the_experts(name):
    pool, images = pool_of(name), images_for(name, N)
    features = nf.expert_forward(pool, images)
    coef = torch.eye(N, dtype=torch.float64)
    torch.testing.assert_close(
        nf.mixture_forward(pool, images, coef), features[range(N), range(N)], **EXACT
    )


@every_architecture
def test_identical_experts_are_any_mixture_of_themselves(name):
    module, images = expert(name), images_for(name, 3)
    pool = nf.ExpertPool([module] * N)
    expected = one_by_one(pool, images, [module.state_dict()])[0]
    for features in nf.expert_forward(pool, images):
        torch.testing.assert_close(features, expected, **EXACT)
    coef = torch.softmax(torch.randn(3, N).double(), 1)
    torch.testing.assert_close(nf.mixture_forward(pool, images, coef), expected, **EXACT)


@every_architecture
def test_the_fallback_agrees_and_is_not_needed(name):
    pool, images, coef = pool_of(name, 2), images_for(name, 2), coefficients(2, 2)
    slow, template = nf.encoders.torch_func, pool.template
    torch.testing.assert_close(
        nf.expert_forward(pool, images), slow.expert_features(pool, template, images), **EXACT
    )
    torch.testing.assert_close(
        nf.mixture_forward(pool, images, coef),
        slow.mixture_features(pool, template, images, coef),
        **EXACT,
    )
    assert not faults(template)


@every_architecture
def test_empty_batches_and_single_experts(name):
    pool, images = pool_of(name, 1), images_for(name, 1)
    state = [pool.state_dict(0)]
    expected = one_by_one(pool, images, state)
    torch.testing.assert_close(nf.expert_forward(pool, images), expected, **EXACT)
    half = nf.mixture_forward(pool, images, torch.ones(1, 1))
    torch.testing.assert_close(half, expected[0], **EXACT)
    pool = pool_of(name)
    assert nf.expert_forward(pool, images[:0]).shape == (N, 0, D)
    for coef in (torch.ones(0, N), torch.ones(N)):
        assert nf.mixture_forward(pool, images[:0], coef).shape == (0, D)


@every_architecture
def test_the_templates_mode_neither_matters_nor_changes(name):
    pool, images, coef = pool_of(name), images_for(name, 2), coefficients(2)
    pool.template.eval()
    expected = nf.expert_forward(pool, images), nf.mixture_forward(pool, images, coef)
    pool.template.train()
    state = {key: tensor.clone() for key, tensor in pool.template.state_dict().items()}
    assert torch.equal(nf.expert_forward(pool, images), expected[0])
    assert torch.equal(nf.mixture_forward(pool, images, coef), expected[1])
    nf.mixture_forward(pool, images, coef[0])
    assert all(module.training for module in pool.template.modules())
    for key, tensor in pool.template.state_dict().items():
        assert torch.equal(tensor, state[key])


@pytest.mark.parametrize("norm", [clip.LayerNormFp32, clip.LayerNorm])
def test_norms_of_another_type_are_those_of_the_pools(norm):
    experts = [tower(norm_layer=norm) for _ in range(N)]
    pool, images = nf.ExpertPool(experts), torch.randn(2, 3, 16, 16)
    features = nf.expert_forward(pool, images)
    working = one_by_one(pool, images, [pool.state_dict(i) for i in range(N)])
    exact = nf.ExpertPool([e.double() for e in experts], dtype=torch.float64)
    oracle = nf.expert_forward(exact, images)
    testing.assert_within_rule(features, working, oracle, terms=D)


@pytest.mark.parametrize("name", ["clip-layer-scale", "timm-map", "clip-resnet", "cnn"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_pools_obey_the_tolerance_rule(name, dtype):
    experts = [expert(name) for _ in range(N)]
    pool = nf.ExpertPool(experts, dtype=dtype)
    exact = nf.ExpertPool(
        [pool.state_dict(i) for i in range(N)], pool.template, dtype=torch.float64
    )
    images, coef = images_for(name, 2).to(dtype), coefficients(2).float()
    states = [pool.state_dict(i) for i in range(N)]
    features, mixture = nf.expert_forward(pool, images), nf.mixture_forward(pool, images, coef)
    assert features.dtype == mixture.dtype == dtype
    terms = 2 * len(list(pool.template.modules()))  # roundings on the way, one per layer or so
    working = one_by_one(pool, images, states).to(dtype)
    testing.assert_within_rule(features, working, nf.expert_forward(exact, images), terms)
    working = merged_one_by_one(pool, images, coef).to(dtype)
    testing.assert_within_rule(mixture, working, nf.mixture_forward(exact, images, coef), terms)


@pytest.mark.parametrize("name", ["clip", "clip-resnet"])
def test_autocast_changes_nothing(name):
    states = [pool_of(name).state_dict(i) for i in range(N)]
    pool = nf.ExpertPool(states, expert(name), dtype=torch.float32)  # autocast leaves fp64 alone
    images, coef = images_for(name, 2).float(), coefficients(2)
    calls = (
        lambda: nf.expert_forward(pool, images),
        lambda: nf.mixture_forward(pool, images, coef),
        lambda: nf.mixture_forward(pool, images, coef[0]),
    )
    for call in calls:
        expected = call()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(call(), expected)


@pytest.mark.parametrize("name", ["clip", "clip-resnet"])
def test_images_of_another_type_are_cast_to_the_pools(name):
    pool, images = pool_of(name), images_for(name, 2)
    expected = nf.expert_forward(pool, images.float())
    assert expected.dtype == torch.float64
    assert torch.equal(expected, nf.expert_forward(pool, images.float().double()))
    strided = images_for(name, 4).mT[::2].mT
    assert torch.equal(nf.expert_forward(pool, strided), nf.expert_forward(pool, strided.clone()))


# -- gradients ------------------------------------------------------------------------------------


def tiny(name):
    if name == "mlp":
        module = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.GELU(), nn.LayerNorm(4))
    elif name == "cnn":
        module = nn.Sequential(
            nn.Conv2d(3, 2, 3, padding=1),  # kernels are the smaller side
            nn.BatchNorm2d(2),
            nn.Tanh(),
            nn.Conv2d(2, 8, 2, padding=1, stride=2),  # windows are
            nn.Flatten(),
        )
    else:
        module = tower(image_size=2, patch_size=1, width=4, layers=1, output_dim=2)
    for key, tensor in module.state_dict().items():
        if key.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.5)
    return module.double()


@pytest.mark.parametrize("policy", ["blend", "mixture_moments"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "vit"])
def test_gradients_reach_the_coefficients(name, policy):
    pool = nf.ExpertPool([tiny(name) for _ in range(2)])
    images = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    coef = torch.softmax(torch.randn(2, 2, dtype=torch.float64), 1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: nf.mixture_forward(pool, images, w, batchnorm=policy), (coef,)
    )
    one = coef[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda w: nf.mixture_forward(pool, images, w, batchnorm=policy), (one,)
    )


# -- BatchNorm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip-resnet", "cnn"])
def test_mixture_moments_are_those_of_the_merged_state_dict(name):
    pool, images = pool_of(name), images_for(name, 3)
    coef = torch.softmax(torch.randn(3, N).double(), 1)
    states = [nf.neulig.batchnorm.merged_state_dict(pool, w, "mixture_moments") for w in coef]
    expected = torch.cat(
        [one_by_one(pool, x[None], [s])[0] for x, s in zip(images, states, strict=True)]
    )
    got = nf.mixture_forward(pool, images, coef, batchnorm="mixture_moments")
    torch.testing.assert_close(got, expected, **EXACT)
    plain = nf.mixture_forward(pool, images, coef)
    assert not torch.allclose(plain, expected, rtol=1e-3)
    one = nf.mixture_forward(pool, images, coef[0], batchnorm="mixture_moments")
    torch.testing.assert_close(one[:1], expected[:1], **EXACT)

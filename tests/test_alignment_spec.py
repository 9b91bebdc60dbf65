"""Which axes move together: every architecture in fp64, and what is wrong is named."""

import copy
import itertools
import re
from pathlib import Path

import open_clip
import open_clip.modified_resnet as clip_resnet
import open_clip.transformer as clip
import pytest
import timm
import torch
from torch import nn
from torchvision.models import resnet as vision

from neulig_fast import alignment
from neulig_fast.alignment import Node, Spec, rules

D = 6


def tower(**settings):
    small = {"image_size": 8, "patch_size": 4, "width": 24, "layers": 2, "heads": 3}
    return clip.VisionTransformer(**{**small, "mlp_ratio": 2, "output_dim": D, **settings})


def without_proj():
    module = tower()
    module.proj = None
    return module


def timm_tower(**settings):
    small = {"img_size": 8, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    return timm.models.VisionTransformer(
        **{**small, "mlp_ratio": 2, "num_classes": D, "act_layer": "gelu", **settings}
    )


def timm_resnet(block, **settings):
    small = {"layers": (1, 2, 1, 1), "channels": (4, 8, 4, 8), "num_classes": D}
    return timm.models.ResNet(block, **{**small, **settings})


def whole_clip():
    image = {"image_size": 8, "patch_size": 4, "width": 24, "layers": 1, "head_width": 8}
    text = {"context_length": 5, "vocab_size": 11, "width": 8, "heads": 2, "layers": 1}
    return open_clip.CLIP(D, open_clip.CLIPVisionCfg(**image), open_clip.CLIPTextCfg(**text))


def plain_cnn():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 12, 3, padding=1, groups=2),
        nn.GroupNorm(2, 12),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.PReLU(12),
        nn.MaxPool2d(2),
        nn.LayerNorm([12, 4, 4]),
        nn.Conv2d(12, 5, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(20, 10),
        nn.Tanh(),
        nn.BatchNorm1d(10),
        nn.Linear(10, D),
    )


def plain_mlp():
    layers = []
    for given, made in itertools.pairwise([7, 5, 9, 4]):
        layers += [nn.Linear(given, made), nn.LayerNorm(made), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(4, D))


def words():
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    after = nn.TransformerEncoderLayer(8, 4, 12, batch_first=True)
    return nn.Sequential(nn.Embedding(11, 8), encoder, after, nn.Flatten(), nn.Linear(40, D))


def residual(block, layers=(1, 2), **settings):
    """torchvision's ResNet of two stages."""
    module = vision.ResNet(block, [*layers, 1, 1], D, **settings)
    module.layer3, module.layer4 = nn.Sequential(), nn.Sequential()
    module.fc = nn.Linear(128 * block.expansion, D)
    return module


def group_norm(channels):
    return nn.GroupNorm(4, channels)


SCALED = {f"scale_{part}": True for part in ("heads", "attn_inner", "attn", "fc")}
BASIC, BOTTLENECK = vision.BasicBlock, vision.Bottleneck
# name -> (model, how many nodes)
ARCHITECTURES = {
    "clip": (tower, 1 + 3 * 2),
    "clip-without-proj": (without_proj, 3 * 2),
    "clip-with-tokens": (lambda: tower(output_tokens=True), 3 * 2),
    "clip-layer-scale": (lambda: tower(ls_init_value=1e-5, pool_type="avg"), 7),
    "clip-average-then-norm": (lambda: tower(pool_type="avg", final_ln_after_pool=True), 7),
    # and of the pool: its query, its input, queries and keys, values
    "clip-attentional": (lambda: tower(attentional_pool=True, attn_pooler_heads=2), 7 + 4),
    # and the order of a head's own scale, in each block
    "clip-custom-blocks": (lambda: tower(qk_norm=True, **SCALED), 7 + 2),
    "clip-whole": (whole_clip, 1 + 3),
    "clip-resnet": (lambda: clip_resnet.ModifiedResNet([1, 2, 1, 1], D, 4, 32, 4), 3 + 2 * 5 + 6),
    "timm": (timm_tower, 7),
    "timm-qk-norm": (lambda: timm_tower(qk_norm=True, init_values=1e-5, reg_tokens=2), 7),
    "timm-without-head": (lambda: timm_tower(num_classes=0, qkv_bias=False), 3 * 2),
    "timm-map": (lambda: timm_tower(global_pool="map", qk_norm=True), 7 + 5),
    "timm-norms": (
        lambda: timm_tower(scale_attn_norm=True, scale_mlp_norm=True, pre_norm=True), 7,
    ),
    "timm-gated-rotary": (lambda: timm_tower(attn_layer=Turned), 7),
    "resnet-basic": (lambda: residual(BASIC), 2 + 3),
    "resnet-bottleneck": (lambda: residual(BOTTLENECK, width_per_group=8), 3 + 2 * 3),
    "resnext": (lambda: residual(BOTTLENECK, groups=4, width_per_group=4), 3 + 2 * 3),
    "resnet-groups": (lambda: residual(BASIC, norm_layer=group_norm), 2 + 3),
    "timm-resnet": (lambda: timm_resnet(timm.models.resnet.BasicBlock, act_layer="gelu"), 5 + 5),
    "timm-resnet-d": (
        lambda: timm_resnet(
            timm.models.resnet.Bottleneck, stem_type="deep", stem_width=8, avg_down=True,
            block_args={"attn_layer": "se"}, aa_layer=timm.layers.BlurPool2d,
        ),
        3 + 3 + 5 * 3,  # the first stage is as wide as the stem
    ),
    "cnn": (plain_cnn, 4),
    "mlp": (plain_mlp, 3),
    "words": (words, 1 + 3 * 3),
}  # fmt: skip
IMAGES = {"resnet": (3, 32, 32), "resnext": (3, 32, 32), "clip-resnet": (3, 32, 32)}
every_architecture = pytest.mark.parametrize("name", ARCHITECTURES)


class Turned(timm.layers.AttentionRope):
    """Rotary attention that a VisionTransformer can be made of."""

    def __init__(self, dim, num_heads, **settings):
        super().__init__(dim, num_heads, num_prefix_tokens=1, gated=True, qk_norm=True,
                         norm_layer=nn.LayerNorm)  # fmt: skip
        self.register_buffer("angles", torch.randn(4, 2 * dim // num_heads), persistent=False)

    def forward(self, x, **masks):
        return super().forward(x, rope=self.angles.to(x.dtype))


alignment.register(Turned)(rules.RULES["timm.layers.attention.AttentionRope"].follow)


def build(name):
    """Weights that make every layer matter."""
    module = ARCHITECTURES[name][0]().double().eval()
    for key, tensor in module.state_dict().items():
        if key.endswith("running_var"):
            nn.init.uniform_(tensor, 0.5, 2)
        elif tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.25)
    return module


def batch_for(name):
    if name == "words":
        return torch.randint(11, (3, 5))
    if name == "mlp":
        return torch.randn(3, 7).double()
    shape = next((s for key, s in IMAGES.items() if key in name), (3, 8, 8))
    return torch.randn(3, *shape).double()


@torch.no_grad()
def outputs(module, batch):
    result = module(batch.clone())
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([part.flatten() for part in parts if part is not None])


def change(module, spec, match, batch):
    """The largest change of the outputs, relative to the largest output."""
    other = copy.deepcopy(module)
    other.load_state_dict(alignment.reorder(spec, match, module.state_dict()))
    expected = outputs(module, batch)
    return float((outputs(other, batch) - expected).abs().max() / expected.abs().max())


# -- every architecture ---------------------------------------------------------------------------


@every_architecture
def test_any_order_of_all_units_leaves_the_function(name):
    module, batch = build(name), batch_for(name)
    spec = alignment.spec_for(module)
    assert len(spec.nodes) == ARCHITECTURES[name][1]
    permuted, match = alignment.random_permutation(module, spec, seed=3)
    assert type(permuted) is type(module)
    assert all(not torch.equal(order, order.sort().values) for order in match.values())
    expected = outputs(module, batch)
    error = (outputs(permuted, batch) - expected).abs().max() / expected.abs().max()
    assert float(error) <= 1e-9
    alignment.verify(module, spec, batch if name == "cnn" else None)
    moved = {use.tensor for use in spec.uses}
    for key, tensor in permuted.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[key]) == (key not in moved), key


# Counters; biases of outputs; of a whole CLIP, its text tower; gains of heads that move as a whole.
STAYS = (
    r"num_batches_tracked$|^(head|fc|4|9|15)\.bias$|c_proj\.bias$|[qk]_norm|^logit_scale$|"
    r"^(transformer|token_embedding|positional_embedding|text_projection|ln_final)"
)
RETURNS_THE_STREAM = ("clip-without-proj", "clip-with-tokens", "timm-without-head")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in RETURNS_THE_STREAM])
def test_no_tensor_is_forgotten(name):
    module = ARCHITECTURES[name][0]()
    used = {use.tensor for use in alignment.spec_for(module).uses}
    assert all(re.search(STAYS, key) for key in module.state_dict() if key not in used)


@pytest.mark.parametrize("name, nodes", [("resnet18", 12), ("resnet50", 37)])
def test_node_counts_of_the_full_networks(name, nodes):
    with torch.device("meta"):
        spec = alignment.spec_for(getattr(vision, name)())
    assert len(spec.nodes) == nodes
    assert {node.blocks for node in spec.nodes.values()} == {1}


def by_entries(spec):
    """The partition of axes into nodes, whatever the nodes are called."""
    return {
        (frozenset(entry(use) for use in spec.uses_of(node.name)), node.size, node.blocks)
        for node in spec.nodes.values()
    }


def entry(use):
    return use.tensor, use.axis, use.start, use.role, use.repeat, use.inner


def named(role, axis, *tensors):
    return [(tensor, axis, 0, role, 1, False) for tensor in tensors]


def affine(*paths):
    return named("vec", 0, *(f"{path}.{name}" for path in paths for name in ("weight", "bias")))


def test_a_vision_transformers_axes_are_those_of_the_literature():
    block = "transformer.resblocks.0."
    at = block + "attn."
    qkv, bias = at + "in_proj_weight", at + "in_proj_bias"
    res = [
        *named("out", 0, "conv1.weight", at + "out_proj.weight", block + "mlp.c_proj.weight"),
        *named("out", 1, "positional_embedding"),
        *named("vec", 0, "class_embedding", at + "out_proj.bias", block + "mlp.c_proj.bias"),
        *affine("ln_pre", block + "ln_1", block + "ln_2", "ln_post"),
        *named("in", 1, qkv, block + "mlp.c_fc.weight"),
        *named("in", 0, "proj"),
    ]
    qk = [
        (name, 0, start, role, 1, False)
        for name, role in ((qkv, "out"), (bias, "vec"))
        for start in (0, 24)
    ]
    vo = [(qkv, 0, 48, "out", 1, False), (bias, 0, 48, "vec", 1, False)]
    vo += named("in", 1, at + "out_proj.weight")
    hidden = [
        *named("out", 0, block + "mlp.c_fc.weight"),
        *named("vec", 0, block + "mlp.c_fc.bias"),
        *named("in", 1, block + "mlp.c_proj.weight"),
    ]
    spec = alignment.spec_for(tower(layers=1))
    assert by_entries(spec) == {
        (frozenset(res), 24, 1),
        (frozenset(qk), 24, 3),
        (frozenset(vo), 24, 3),
        (frozenset(hidden), 48, 1),
    }
    tied = [node for node in spec.nodes.values() if node.blocks == 3]
    assert tied[0].tie == tied[1].tie is not None


def test_flattened_channels_repeat_and_flattened_tokens_tile():
    spec = alignment.spec_for(plain_cnn())
    (use,) = (use for use in spec.uses if use.tensor == "12.weight" and use.axis == 1)
    assert (use.start, use.repeat, use.node) == (0, 4, "9")
    uses = [use for use in alignment.spec_for(words()).uses if use.tensor == "4.weight"]
    assert [(use.start, use.repeat) for use in uses] == [(8 * k, 1) for k in range(5)]


def test_groups_of_the_input_keep_their_order():
    module = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.ReLU())
    module.append(nn.Conv2d(4, 2, 1))
    assert list(alignment.spec_for(module).nodes) == ["2"]


# -- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "timm-qk-norm", "clip-resnet", "words"])
def test_queries_and_values_need_one_order_of_heads(name):
    module, batch = build(name), batch_for(name)
    spec = alignment.spec_for(module)
    apart = Spec(
        [Node(n.name, n.size, n.blocks, None, n.shared_inner) for n in spec.nodes.values()],
        spec.uses,
    )
    node = next(node for node in spec.nodes.values() if node.tie is not None)
    rows = torch.arange(node.size).view(node.blocks, -1)
    match = {**spec.identity(), node.name: rows.roll(1, 0).flatten()}
    assert change(module, apart, match, batch) > 1e-5
    with pytest.raises(ValueError, match="blocks are in another order than"):
        alignment.reorder(spec, match, module.state_dict())
    with pytest.raises(ValueError, match=f"node {node.name} changes the outputs by"):
        alignment.verify(module, apart)


def test_two_heads_leave_no_room_for_chance():
    """There is one order of two heads but the identity, so that all nodes at once prove nothing."""
    module = tower(layers=1, heads=2)
    spec = alignment.spec_for(module)
    alignment.verify(module, spec)
    apart = Spec([Node(n.name, n.size, n.blocks) for n in spec.nodes.values()], spec.uses)
    with pytest.raises(ValueError, match=r"re-ordering the blocks of node .*attn\.qk changes"):
        alignment.verify(module, apart)


def test_a_gain_that_all_heads_share_makes_their_inner_orders_one():
    spec = alignment.spec_for(timm_tower(qk_norm=True))
    shared = [node.name for node in spec.nodes.values() if node.shared_inner]
    assert shared == ["blocks.0.attn.qk", "blocks.1.attn.qk"]
    free = alignment.spec_for(timm_tower(qk_norm=False))
    assert not any(node.shared_inner for node in free.nodes.values())


def test_rotary_heads_move_as_a_whole():
    spec = alignment.spec_for(timm_tower(attn_layer=Turned))
    node = spec.nodes["blocks.0.attn.heads"]
    assert (node.size, node.blocks, node.tie) == (3, 3, spec.nodes["blocks.0.attn.vo"].tie)
    assert {use.repeat for use in spec.uses_of(node.name)} == {8}


# -- orders ---------------------------------------------------------------------------------------


def test_an_order_depends_on_the_seed_and_the_nodes_name_alone():
    big, small = tower(), tower(layers=1)
    specs = [alignment.spec_for(module) for module in (big, small)]
    (_, match), (_, fewer) = (
        alignment.random_permutation(module, spec, 5)
        for module, spec in zip((big, small), specs, strict=True)
    )
    assert fewer.keys() < match.keys()
    assert all(torch.equal(match[name], order) for name, order in fewer.items())
    _, other = alignment.random_permutation(small, specs[1], 6)
    assert not any(torch.equal(fewer[name], order) for name, order in other.items())
    orders = {tuple(order.tolist()) for order in match.values() if len(order) == 24}
    assert len(orders) == 5  # as many as nodes of that size
    torch.manual_seed(99)
    _, again = alignment.random_permutation(small, specs[1], 5)
    assert all(torch.equal(fewer[name], order) for name, order in again.items())


def test_the_model_is_left_as_it_is():
    module = tower().train()
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    spec = alignment.spec_for(module)
    alignment.random_permutation(module, spec, 0)
    alignment.verify(module, spec)
    assert all(m.training for m in module.modules())
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[key]) and tensor.dtype == state[key].dtype


# -- what is wrong is named -----------------------------------------------------------------------


FRESH = {
    "clip": lambda: tower(layers=1, ls_init_value=1e-5),
    "timm": lambda: timm_tower(depth=1, qk_norm=True),
    "resnet": lambda: residual(BASIC, (1, 1)),
    "cnn": plain_cnn,
}


@pytest.mark.parametrize("name", FRESH)
def test_every_use_that_is_left_out_is_missed(name):
    """In a fresh network, where biases are zero, gains tiny and statistics 0 and 1."""
    module = FRESH[name]()
    spec = alignment.spec_for(module)
    for use in spec.uses[:: {"clip": 1, "resnet": 5}.get(name, 2)]:
        if re.search("in_proj_bias|qkv.bias|k_norm.bias", use.tensor) and use.start in (0, 24):
            continue  # softmax does not see a key's bias, and two uses of one tensor look alike
        broken = Spec(spec.nodes.values(), [other for other in spec.uses if other is not use])
        with pytest.raises(ValueError, match=rf"node {re.escape(use.node)}\b") as caught:
            alignment.verify(module, broken, batch_for(name) if name == "cnn" else None)
        left_out = f"not in the spec, though long enough:.*{re.escape(use.tensor)} axis {use.axis}"
        text = str(caught.value)
        assert re.search(left_out, text) or " more" in text or use.repeat > 1 or use.inner, text


def test_every_node_at_fault_is_named_and_no_other():
    module = plain_mlp()
    spec = alignment.spec_for(module)
    gone = {("0.bias", 0), ("6.weight", 1)}
    broken = Spec(spec.nodes.values(), [u for u in spec.uses if (u.tensor, u.axis) not in gone])
    with pytest.raises(ValueError, match="verify: 2 problems") as caught:
        alignment.verify(module, broken)
    text = str(caught.value)
    assert re.search(r"node 0 changes the outputs by \S+ of the largest; .*0\.bias axis 0", text)
    assert re.search(r"node 3 changes the outputs by \S+ of the largest; .*6\.weight axis 1", text)
    assert "node 6" not in text


def test_a_spec_of_another_model_is_refused():
    spec = alignment.spec_for(plain_mlp())
    with pytest.raises(ValueError, match=r"6 problems(.|\n)*node 0 uses 0\.bias, which is not"):
        alignment.verify(plain_cnn(), spec)


def test_outputs_that_tell_nothing_are_refused():
    module = nn.Sequential(nn.Linear(3, 4), nn.Hardshrink(1e9), nn.Linear(4, 2, bias=False))
    with pytest.raises(ValueError, match=r"largest output is 0\.0, which tells nothing"):
        alignment.verify(module, alignment.spec_for(module))


def test_inputs_that_cannot_be_made_up_are_asked_for():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 5 * 9, 2))
    spec = alignment.spec_for(module)
    with pytest.raises(ValueError, match="pass inputs="):
        alignment.verify(module, spec)
    alignment.verify(module, spec, torch.randn(2, 3, 7, 11))
    alignment.verify(module, spec, (torch.randn(2, 3, 7, 11, dtype=torch.float16),))


@pytest.mark.parametrize(
    "module, message",
    [
        (nn.Sequential(nn.Linear(4, 6), nn.Linear(5, 2)), r"1\.weight has 5 .*axis 1 .*6 units"),
        (nn.Sequential(nn.Linear(4, 6), nn.Linear(12, 2)), r"1\.weight has 12 .*6 units of 0"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2)), r"1 is given units of 0 .*'channels'"),
        (nn.Sequential(nn.Linear(4, 6), nn.Conv1d(6, 2, 1)), r"1 is given units of 0 .*'last'"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm(4)), r"1 is given units of 0 .*'channels'"),
        (
            nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.GroupNorm(4, 8)),
            r"3 needs 4 blocks, but the units of 0 .* are in 2",
        ),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            r"1 is a .*BatchNorm1d that the rule does not cover: track_running_stats=False",
        ),
        (tower(attentional_pool="parallel", attn_pooler_heads=2), "attentional_pool='parallel'"),
    ],
    ids=range(8),
)  # fmt: skip
def test_what_does_not_fit_is_said(module, message):
    with pytest.raises(ValueError, match=f"spec_for: {message}|spec_for: .*{message}"):
        alignment.spec_for(module)


def test_residual_streams_with_unlike_group_norms_are_refused():
    def norm(channels):
        return nn.GroupNorm(2 if channels == 64 else 4, channels)

    module = vision.ResNet(BASIC, [1, 1, 1, 1], D, norm_layer=norm)
    module.layer1[0].bn2 = nn.GroupNorm(4, 64)
    with pytest.raises(ValueError, match=r"layer1\.0\.conv2 needs 4 blocks, .* conv1 .* are in 2"):
        alignment.spec_for(module)


def test_hooks_and_patched_forwards_are_refused():
    for patch in (
        lambda m: m.register_forward_hook(lambda *args: None),
        lambda m: setattr(m, "forward", torch.sin),
    ):
        module = plain_mlp()
        patch(module[2])
        with pytest.raises(ValueError, match=r"2 is a .*GELU that the rule does not cover: it has"):
            alignment.spec_for(module)


def test_a_type_has_one_rule():
    with pytest.raises(ValueError, match=r"register: torch\.nn\.modules\.linear\.Linear has"):
        alignment.register("torch.nn.modules.linear.Linear")(lambda *args: None)


def test_not_a_module():
    with pytest.raises(
        TypeError, match=r"spec_for: model must be a torch.nn.Module, got OrderedDict"
    ):
        alignment.spec_for(plain_mlp().state_dict())


def test_the_examples_of_the_docs_run_as_printed(capsys):
    page = (Path(__file__).resolve().parents[1] / "docs/align.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    assert examples
    exec("\n".join(examples), {"__name__": "examples"})
    assert capsys.readouterr().out.count("Node(name=") == 3
